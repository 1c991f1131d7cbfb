"""Carries weights from a trainer to vLLM engines through a safetensors file that both see, on CPUs and GPUs alike.

The trainer calls `TrainingEngine.write_weights`; an engine built with `WeightTransferConfig(backend="file")` loads the file, or all
safetensors files of a checkpoint directory, in vLLM's own lifecycle (start_weight_update, update_weights({"path": ..., "version": ...}),
finish_weight_update). It refuses a file of another version and weights that do not fill the model, which log-probabilities in bfloat16 are
too coarse to show. vLLM finds the backend in each of its processes through `register`, our entry point in the group
`vllm.general_plugins`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # engines without torch and commands that only look start three seconds sooner
    from torch import Tensor

BACKEND = "file"


def write_weights(path: str | Path, weights: dict[str, "Tensor"], version: int) -> None:
    """Publishes weights as one safetensors file, by rename: a reader sees all of them or the file that was there before."""
    from safetensors.torch import save_file

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save_file(weights, unfinished, {"version": str(version)})
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_weights(path: Path) -> Iterator[tuple[str, "Tensor"]]:
    """The weights of a safetensors file, or of all such files of a checkpoint directory."""
    from safetensors import safe_open

    for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(part, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def _check_version(path: Path, version: int) -> None:
    """Raises RuntimeError for a file of other weights than were announced, as a disk with a cache of its own may show it."""
    from safetensors import safe_open

    if path.is_dir():  # a checkpoint, which never changes
        return
    with safe_open(path, "pt") as file:
        found = (file.metadata() or {}).get("version")
    if found != str(version):
        raise RuntimeError(f"{path}: holds weights of version {found}, not {version}; this machine sees an older file")


def register() -> None:
    """Teaches vLLM the backend "file"; may be called any number of times in a process."""
    from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    if BACKEND in WeightTransferEngineFactory._registry:
        return

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        pass

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        path: str
        version: int

    class FileEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            """A file needs no connection."""

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)
            tied = getattr(self.model_config.hf_text_config, "tie_word_embeddings", False)
            names = {name for name, _ in self.model.named_parameters() if not (tied and name.endswith("lm_head.weight"))}
            self._missing = names if self.model_config.quantization is None else set()  # scales are computed, and come in no file

        def receive_weights(self, update_info: UpdateInfo) -> None:
            model: Any = self.model
            _check_version(Path(update_info.path), update_info.version)
            loaded = model.load_weights(_read_weights(Path(update_info.path)))
            self._missing -= self._missing if loaded is None else loaded  # a few models do not say what they took

        def finish_weight_update(self) -> None:
            if self._missing:
                raise RuntimeError(f"these weights of the model did not come: {', '.join(sorted(self._missing)[:3])}")
            finalize_layerwise_reload(self.model, self.model_config)
            # On a CPU the output layer multiplies by a packed copy of its weights. When they are tied to the embedding the
            # reload renews the embedding only, and the model would keep answering with the old output layer.
            for layer in self.model.modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)

        def shutdown(self) -> None:
            """A file holds nothing open."""

    WeightTransferEngineFactory.register_engine(BACKEND, FileEngine)

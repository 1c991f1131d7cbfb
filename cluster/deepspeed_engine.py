"""One model under DeepSpeed ZeRO: optimiser steps, checkpoints, export. The only module that imports DeepSpeed.

Every method is SPMD: all ranks call it in the same order, under Ray Train, torchrun or alone in one process. Promises: a
step's gradient is the mean over all learnt tokens of all ranks, however they are cut into micro-batches; a packed forward
gives each row the scores it has alone; a step whose loss is no number changes nothing; what leaves the engine (`export`,
`write_weights`) is a plain full model, whatever the ZeRO stage, with adapters merged into a copy. On a CPU nothing is compiled.
"""

import argparse
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from copy import copy
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.causal_model import TokenScores, load
from cluster.errors import Diverged, SpecmillError, UserError
from cluster.models import copy_tokenizer
from cluster.training_config import TrainingConfig
from cluster.weight_transfer import write_weights

TAG = "engine"
"""DeepSpeed's name for the one checkpoint of a directory."""

ADAPTER = "adapter"
"""Folder of an exported model for its adapters, which are merged in its weights."""

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for its peers before it dies; DeepSpeed's own default is 10 minutes."""


class TokenLoss(Protocol):
    """What a loss function returns; the names of `stats` are the same on every rank."""

    @property
    def loss(self) -> Tensor:
        """Float [L] with gradient, not multiplied by the mask."""

    @property
    def stats(self) -> Mapping[str, Tensor]:
        """Name -> float [L]."""


class Packed(Protocol):
    """A micro-batch: rows laid end to end, T tokens, of which L are learnt."""

    @property
    def input_ids(self) -> Tensor:
        """Int64 [T]."""

    @property
    def position_ids(self) -> Tensor:
        """Int64 [T], from 0 again with each row."""

    @property
    def learnt(self) -> Tensor:
        """Int64 [L], the positions that predict a learnt token; logits are computed for them alone."""

    @property
    def targets(self) -> Tensor:
        """Int64 [L], the tokens that they predict."""

    @property
    def mask(self) -> Tensor:
        """Float [L], the loss weight of each prediction."""

    def to(self, device: torch.device) -> Self:
        """The same micro-batch on `device`."""


Batch = TypeVar("Batch", bound=Packed)
Answer = TypeVar("Answer")


class TrainingEngine:
    """A causal language model, its optimiser and its learning-rate schedule over `total_steps` steps."""

    def __init__(self, model_path: str, config: TrainingConfig, total_steps: int) -> None:
        self.model_path = model_path
        self.config = config
        self.device = _join_process_group()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._reference: torch.nn.Module | None = None
        with room_in_memory():
            self._engine = _build(model_path, config, total_steps, self.device)
        self._clipped_norm = 0.0
        if not config.zero_stage:  # then DeepSpeed keeps no norm; the optimiser sees the gradients of all ranks
            self._engine.basic_optimizer.register_step_pre_hook(self._note_norm)

    def step(
        self, micro_batches: Sequence[Batch], loss_fn: Callable[[TokenScores, Batch], TokenLoss], temperature: float = 1.0
    ) -> dict[str, float]:
        """One optimiser step over this rank's micro-batches (equally many on every rank; dummies have an all-zero mask).

        `loss_fn(scores, micro_batch)` gives per-token values. Loss and statistics are averaged over the mask of all micro-batches of all
        ranks: sum(loss * mask) / N_global, times the world size because DeepSpeed averages over ranks. Returns those means with `weight`
        (N_global, the sum of the masks), `gradient_norm` (at ZeRO-0 after clipping) and `learning_rate`, the same on every rank. Raises
        Diverged, on every rank, when the loss is no number, with the weights as they were, or when the gradient is none; then nothing of
        this engine is worth keeping.
        """
        tokens = self._count_tokens(micro_batches)
        learning_rate = self._engine.get_lr()[0]
        sums: dict[str, Tensor] = {}
        self._engine.train()  # as checkpointing of gradients wants it; dropout is off
        for micro_batch in micro_batches:
            with room_in_memory():
                batch = micro_batch.to(self.device)
                answer = loss_fn(_scores(self._engine, batch, temperature), batch)
                loss = (answer.loss * batch.mask).sum()
                self._engine.backward(loss * (self.world_size / tokens))
            for name, value in {"loss": answer.loss.detach(), **answer.stats}.items():
                sums[name] = sums.get(name, 0.0) + (value.double() * batch.mask).sum()
        means = torch.stack(list(sums.values())) / tokens
        dist.all_reduce(means)
        metrics = dict(zip(sums, means.tolist(), strict=True))
        if not math.isfinite(metrics["loss"]):
            raise Diverged(f"the training loss became {metrics['loss']}; lower training.learning_rate or use float32.")
        with room_in_memory():
            self._engine.step()
        norm = float(self._engine.get_global_grad_norm()) if self.config.zero_stage else self._clipped_norm
        if not math.isfinite(norm):
            raise Diverged(f"the gradient's norm became {norm}; lower training.learning_rate or use float32.")
        return {**metrics, "weight": tokens, "gradient_norm": norm, "learning_rate": learning_rate}

    def evaluate(
        self,
        micro_batches: Sequence[Batch],
        fn: Callable[[TokenScores, Batch], Answer],
        temperature: float = 1.0,
        *,
        reference: bool = False,
    ) -> list[Answer]:
        """`fn(scores, micro_batch)` of each micro-batch without gradient; at ZeRO-3 equally many on every rank.

        With `reference` the scores are those of the model as it was before any step: the adapters are switched off, or, without
        adapters, every rank holds a second, frozen copy of the weights.
        """
        self._engine.eval()
        model: torch.nn.Module = self._engine
        without_adapters: AbstractContextManager[Any] = nullcontext()
        if reference and self.config.lora_rank:
            without_adapters = self._engine.module.model.disable_adapter()
        elif reference:
            model = self._reference_model()
        answers = []
        with torch.no_grad(), without_adapters, room_in_memory():
            for micro_batch in micro_batches:
                batch = micro_batch.to(self.device)
                answers.append(fn(_scores(model, batch, temperature), batch))
        return answers

    def save(self, directory: str | Path, state: dict[str, Any]) -> None:
        """Writes this rank's share of a checkpoint, and `state` (small, as JSON), into its own directory or a shared one."""
        self._engine.save_checkpoint(str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=bool(self.config.lora_rank))
        if self.rank == 0:
            (Path(directory) / "state.json").write_text(json.dumps({"ranks": self.world_size, "state": state}))

    def load(self, directory: str | Path) -> dict[str, Any]:
        """Continues from a directory that holds the shares of all ranks; returns the state that was saved with them.

        Another number of ranks than it was saved with is fine: the shares are converted to DeepSpeed's universal checkpoint first.
        """
        record = json.loads((Path(directory) / "state.json").read_text())
        if record["ranks"] == self.world_size or not self.config.zero_stage:
            self._engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=not self.config.lora_rank)
        else:
            self._load_universal(Path(directory))
        state: dict[str, Any] = record["state"]
        return state

    def _load_universal(self, directory: Path) -> None:
        """Loads what another number of ranks saved, through a copy on each machine's disk that is sorted by weights."""
        with tempfile.TemporaryDirectory(prefix="universal-") as place:
            name: list[str] = [place]
            dist.broadcast_object_list(name)
            folder, failed = Path(name[0]), ""
            if int(os.environ["LOCAL_RANK"]) == 0:
                try:
                    folder.mkdir(exist_ok=True)
                    _convert(directory / TAG, folder / TAG)
                except Exception as error:  # the peers have to hear of it, or they would wait for ever
                    failed = f"{type(error).__name__}: {error}"
            failures: list[str] = [""] * self.world_size
            dist.all_gather_object(failures, failed)
            if any(failures):
                raise SpecmillError(f"a checkpoint of another number of ranks could not be converted: {next(filter(None, failures))}")
            self._engine._config.load_universal_checkpoint = True
            try:
                self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not self.config.lora_rank)
            finally:
                self._engine._config.load_universal_checkpoint = False
            for state in self._engine.basic_optimizer.state.values():  # the loader shares one counter among weights, on the CPU
                state["step"] = state["step"].to(state["exp_avg"].device, torch.float32, copy=True)
            dist.barrier()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(transformers' name, CPU tensor) of every weight in the training dtype; tied weights once, adapters merged.

        At ZeRO-3 each weight is gathered from all ranks when its turn comes: every rank must iterate to the end.
        """
        import deepspeed

        module = self._engine.module.model
        adapted = [layer for layer in module.modules() if hasattr(layer, "get_delta_weight")]
        adapters = {id(layer.get_base_layer().weight): layer for layer in adapted}
        seen: set[int] = set()
        for name, weight in module.state_dict(keep_vars=True).items():
            if id(weight) in seen or ".lora_" in name:
                continue
            seen.add(id(weight))
            layer = adapters.get(id(weight))
            parts = [weight] if layer is None else list(layer.parameters())
            sharded = [part for part in parts if hasattr(part, "ds_id")]
            with torch.no_grad(), deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
                value = weight.detach()
                if layer is not None:
                    value = (value.float() + layer.get_delta_weight("default").float()).to(weight.dtype)
                value = value.to("cpu", copy=True).contiguous()
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), value

    def write_weights(self, path: str | Path, version: int) -> None:
        """Publishes all weights for engines, by the names and in the shapes of a saved checkpoint. All ranks call it together."""
        from transformers.core_model_loading import revert_weight_conversion

        if self.rank == 0:
            write_weights(path, revert_weight_conversion(self._engine.module.plain, dict(self.named_weights())), version)
        else:
            for _ in self.named_weights():
                pass

    def export(self, directory: str | Path, beside: Sequence[Path] = ()) -> None:
        """Publishes a full Hugging Face checkpoint (safetensors, configuration, tokenizer) under `directory`, by rename.

        Adapters lie in it a second time, as they are, in `adapter`, which peft puts on the model that was trained from. Replaces what was
        there; copies the files `beside` along; rank 0 holds the whole model in memory. When it returns on a rank, the checkpoint is
        complete.
        """
        target = Path(directory)
        adapters = self._adapters()
        if self.rank == 0:
            weights = dict(self.named_weights())
            target.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".exporting-"))
            try:
                self._engine.module.plain.save_pretrained(work, state_dict=weights)
                copy_tokenizer(Path(self.model_path), work)
                if adapters:
                    _write_adapters(work / ADAPTER, self._engine.module.model, adapters)
                for file in beside:
                    shutil.copyfile(file, work / file.name)
                work.chmod(0o755)
                shutil.rmtree(target, ignore_errors=True)
                work.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        else:
            for _ in self.named_weights():
                pass
        dist.barrier()

    def _adapters(self) -> dict[str, Tensor]:
        """The adapters' weights by peft's names, as CPU tensors; every rank takes part."""
        import deepspeed

        found = {}
        for name, weight in self._engine.module.model.named_parameters():
            if ".lora_" in name:
                with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
                    found[name] = weight.detach().to("cpu", copy=True).contiguous()
        return found

    def _note_norm(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        self._clipped_norm = float(torch.nn.utils.get_total_norm(gradients))

    def _count_tokens(self, micro_batches: Sequence[Packed]) -> float:
        """Sum of all masks of all ranks; an unequal number of micro-batches is an error here instead of a hang later."""
        total = torch.stack([batch.mask.sum() for batch in micro_batches]).sum().double()
        sums = torch.stack([total, total.new_tensor(len(micro_batches))]).to(self.device)
        dist.all_reduce(sums)
        tokens, count = sums.tolist()
        if count != len(micro_batches) * self.world_size:
            raise ValueError(f"rank {self.rank} has {len(micro_batches)} micro-batches, all ranks together {count:.0f}")
        if tokens <= 0:
            raise ValueError("a step needs at least one token with a loss weight")
        return float(tokens)

    def _reference_model(self) -> torch.nn.Module:
        if self._reference is None:
            model = load(self.model_path, self.config, on_gpu=self.device.type == "cuda")
            self._reference = model.to(self.device).eval().requires_grad_(False)
        return self._reference


@contextmanager
def room_in_memory() -> Iterator[None]:
    """Says what to change when a GPU's memory is full: it would be full again."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a GPU has no memory left ({str(error).partition('.')[0]}). Lower training.micro_batch_tokens or "
            "training.logit_tokens, set training.gradient_checkpointing or training.offload, raise training.zero_stage, or train adapters "
            "(training.lora_rank). What is trained so far is kept, unless stage or adapters change."
        ) from error


def _join_process_group() -> torch.device:
    """Joins the group that the environment describes (Ray Train has joined already; alone, a group of one) on CPU or GPU."""
    on_gpu = dist.get_backend() == "nccl" if dist.is_initialized() else torch.cuda.is_available()
    # before the first import of deepspeed, which otherwise probes for every accelerator it knows
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    import deepspeed.ops

    if not on_gpu:
        # An empty table of usable ops: DeepSpeed would compile its shared-memory collective now, for about a minute.
        deepspeed.ops.__compatible_ops__ = {}
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        if "RANK" in os.environ:
            # without device_id: with it, groups that DeepSpeed and vLLM open later hang (DeepSpeed #7266)
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, timeout=TIMEOUT)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _build(model_path: str, config: TrainingConfig, total_steps: int, device: torch.device) -> Any:
    """The DeepSpeed engine around the model."""
    import deepspeed
    from torch.optim.lr_scheduler import LambdaLR

    settings = config.deepspeed_settings(on_gpu=device.type == "cuda")
    torch.manual_seed(config.seed)
    model = load(model_path, config, settings if config.zero_stage == 3 else None, on_gpu=device.type == "cuda")
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[weight for weight in model.parameters() if weight.requires_grad],
        config=settings,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, config.rate_factor(total_steps)),
    )
    return engine


def _scores(model: torch.nn.Module, batch: Packed, temperature: float) -> TokenScores:
    scores: TokenScores = model(batch.input_ids, batch.position_ids, batch.learnt, batch.targets, temperature)
    return scores


def _write_adapters(folder: Path, model: Any, adapters: dict[str, Tensor]) -> None:
    """What `peft.PeftModel.from_pretrained` reads."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir()
    config = copy(model.peft_config["default"])
    config.target_modules = sorted(config.target_modules)  # a set, which has another order in every process
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(model, adapters, save_embedding_layers=False)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


def _convert(shares: Path, target: Path) -> None:
    """Sorts the shares of a checkpoint by weights: DeepSpeed's own converter, which narrates."""
    from deepspeed.checkpoint import ds_to_universal

    settings = argparse.Namespace(
        input_folder=str(shares),
        output_folder=str(target),
        strict=True,
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        inject_missing_state=True,  # what only models with tensor parallelism save
    )
    with redirect_stdout(io.StringIO()):
        ds_to_universal.main(settings)

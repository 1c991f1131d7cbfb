"""vLLM's asynchronous engine behind the `Engine` interface. The only module, beside the weight-transfer plugin, that imports vLLM."""

import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.chat import Turn, chat_of
from cluster.engine import Completion, EngineConfig, EngineDied, Sampling, Unavailable, request_ids
from cluster.errors import UserError
from cluster.models import Model
from cluster.weight_transfer import BACKEND


def environment(config: EngineConfig) -> dict[str, str]:
    """Environment of the process that holds an engine.

    On CPU the engine core runs the model itself instead of a second process that it would poll, which on a small machine costs a core;
    that needs torch's OpenMP runtime preloaded and the thread count set from outside.
    """
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.gpus == 0:
        variables |= {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
        }
        runtime = _openmp()
        if runtime:
            variables["LD_PRELOAD"] = runtime
    return variables


def engine_options(config: EngineConfig) -> dict[str, Any]:
    """What vLLM is told of an engine, beside its model."""
    from vllm.config import StructuredOutputsConfig

    options: dict[str, Any] = {
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel,
        # The workers of one engine are processes of its own machine, which end with it and hold nothing of Ray's.
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
        "enforce_eager": config.gpus == 0,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        # JSON without white space: shorter, and no model can fill its answer with blanks. A request cannot ask for it.
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
        "seed": 0,
    }
    if config.gpus:
        return options | {"gpu_memory_utilization": config.gpu_memory_utilization}
    # Seeded requests die on the CPU when a prompt is prefilled in pieces (torch's CPU generator has no offset).
    return options | {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": config.max_model_len,
        # The prefix cache holds whole blocks: small ones leave less of a prompt to compute again (128 is the CPU's default).
        "block_size": 32,
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
    }


class VllmEngine:
    """One model served by vLLM in this process's child; call `start` once, from the event loop that uses it."""

    def __init__(self, model: Model, config: EngineConfig, receives_weights: bool = False) -> None:
        self.model, self.config, self.receives_weights = model, config, receives_weights
        self._chat = chat_of(model.path)
        # A base model's tokenizer may name another end than its template writes. A judge's answer ends with its grammar.
        self._ends: list[int] = []
        with suppress(UserError):
            self._ends.append(self._chat.end_of_turn)
        self._engine: Any = None

    async def start(self) -> None:
        """Loads the weights. Takes 10 to 60 seconds."""
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        options = engine_options(self.config)
        if self.receives_weights:
            options["weight_transfer_config"] = WeightTransferConfig(backend=BACKEND)
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=self.model.path, disable_log_stats=True, **options))
        if self.receives_weights:
            await self._engine.init_weight_transfer_engine(_request(init_info={}))

    async def complete(self, turns: Sequence[Turn], sampling: Sampling) -> Completion:
        """Draws one completion; see `Engine.complete`."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = request_ids(self._chat, turns, sampling, self.config)
        held = None
        if sampling.grammar or sampling.json_schema:
            held = StructuredOutputsParams(grammar=sampling.grammar, json=sampling.json_schema)
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop_token_ids=self._ends,
            structured_outputs=held,
            logprobs=0 if sampling.logprobs else None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        result: Any = None
        try:
            async for output in self._engine.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex):
                result = output
        except EngineDeadError as error:
            raise EngineDied(str(error)) from error
        except EngineGenerateError as error:
            raise Unavailable(f"vLLM failed: {error.__cause__ or error}") from error
        if result is None or result.outputs[0].finish_reason == "abort":
            raise Unavailable("vLLM gave the request up, because it took other weights")
        drawn = result.outputs[0]
        ids = list(drawn.token_ids)
        logprobs = [entry[token].logprob for token, entry in zip(ids, drawn.logprobs, strict=True)] if drawn.logprobs else []
        text, reason, cached = self._chat.decode(ids), str(drawn.finish_reason), result.num_cached_tokens or 0
        return Completion(text, reason, len(prompt), cached, len(ids), prompt, ids, logprobs)

    async def load_weights(self, path: str, version: int) -> None:
        """Replaces the weights by those of a safetensors file or checkpoint directory and forgets the prefix cache.

        What is being drawn is given up: a trainer that died while it waited for answers leaves requests behind, and a step between two
        sets of weights would draw from neither, or end the engine.
        """
        await self._engine.pause_generation(mode="abort", clear_cache=True)
        await self._engine.start_weight_update()
        await self._engine.update_weights(_request(update_info={"path": path, "version": version}))
        await self._engine.finish_weight_update(str(version))
        await self._engine.resume_generation()

    async def stop(self) -> None:
        """Ends the engine's processes and frees its memory."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None


def _request(**content: Any) -> Any:
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

    return WeightTransferInitRequest(**content) if "init_info" in content else WeightTransferUpdateRequest(**content)


def _openmp() -> str | None:
    import torch

    found = sorted((Path(os.path.dirname(torch.__file__)) / "lib").glob("libgomp*"))
    return str(found[0]) if found else None

"""`ray.data.llm` and Specmill, each with its own engines, on the same requests.

    python tests/benchmarks/ray_data_llm.py --runs 3

The engines are configured alike, and `ray.data.llm` gets what it is quickest with: ready token ids, so that its stages for templates and
tokenising are off, nothing to decode, small batches of which a quarter more than an engine works on are in flight. It cannot bind
engines to cores; the kernel may move them. It writes Parquet, without checkpoints.

It starts engines for every run. Its rows/s are counted from its first drawn token to its last, as vLLM noted them: starting, compiling the
grammar, the first prompt and writing the last file are left out. Specmill's are counted from the plan to the last commit, after some
rows that compile the grammar, and from an empty prefix cache.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
from raw_vllm import forget, on_all
from report import machine, ranged, ratio, row, say
from workload import Request, Result, engine_of, engine_parser, fresh, requests_of, specmill, write_run

from cluster.chat import chat_of
from cluster.engine import EngineConfig
from cluster.models import Model
from cluster.pool import Pool
from cluster.session import ray_session
from cluster.vllm_engine import engine_options, environment

BATCH_ROWS = 8


def keep(answer: dict[str, Any]) -> dict[str, Any]:
    """What is written of an answer."""
    times = answer["metrics"]
    return {"token_ids": answer["generated_tokens"], "first": times["first_token_ts"], "last": times["last_token_ts"]}


def ray_data(requests: list[Request], model: Model, config: EngineConfig, folder: Path) -> Result:
    """The way of `ray.data.llm`."""
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    chat = chat_of(model.path)
    rows = []
    for request in requests:
        drawn = request.sampling
        sampling = {"temperature": drawn.temperature, "max_tokens": drawn.max_tokens, "seed": drawn.seed, "detokenize": False}
        held = {"structured_outputs": {"grammar": drawn.grammar}}
        rows.append({"tokenized_prompt": chat.prompt(request.turns), "sampling_params": sampling | held})
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=model.path,
            engine_kwargs=engine_options(config),
            runtime_env={"env_vars": environment(config) | ({} if config.gpus else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"})},
            placement_group_config={"bundles": [{"CPU": 1, "GPU": config.gpus} if config.gpus else {"CPU": 1}]},
            concurrency=(config.engines, config.engines),
            batch_size=BATCH_ROWS,
            max_concurrent_batches=-(-5 * config.max_num_seqs // (4 * BATCH_ROWS)),
            log_engine_metrics=False,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
        ),
        postprocess=keep,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    processor(ray.data.from_items(rows, override_num_blocks=-(-len(rows) // BATCH_ROWS))).write_parquet(str(folder))
    made = ds.dataset(folder).to_table()
    if made.num_rows != len(rows):
        raise RuntimeError(f"{made.num_rows} of {len(rows)} requests were drawn")
    seconds = max(made["last"].to_pylist()) - min(made["first"].to_pylist())
    return Result(made.num_rows, sum(map(len, made["token_ids"].to_pylist())), seconds)


def compare(arguments: argparse.Namespace) -> None:
    """All runs, and their rows of the table."""
    say(machine())
    engine = engine_of(arguments)
    speeds: dict[str, list[float]] = {"ray.data.llm": [], "Specmill": []}
    with tempfile.TemporaryDirectory() as place, ray_session():
        file = write_run(Path(place) / "run", arguments.prompts, engine, n=2)
        first = write_run(Path(place) / "first", arguments.batch, engine, n=1)
        for number in range(arguments.runs):
            run = fresh(file, number)
            results = {"ray.data.llm": ray_data(requests_of(run), run.generator.model, run.generator.config, Path(place) / f"ray-{number}")}
            with Pool(run.generator.config) as pool:
                for work in (fresh(first, number), run):
                    on_all(pool, forget, [None] * arguments.engines)
                    work.generator = pool
                    results["Specmill"] = specmill(work)
            for name, result in results.items():
                say(f"run {number + 1}: {name} {result.rows} rows, {result.tokens} tokens in {result.seconds:.1f} s")
                speeds[name].append(result.rows / result.seconds)
    for name, values in speeds.items():
        ranged(name, values, "rows/s with vLLM")
    if arguments.runs > 1:
        mean, low, high = ratio(list(zip(speeds["Specmill"], speeds["ray.data.llm"], strict=True)))
        row("Specmill / ray.data.llm", f"{mean:.3f}", f"95 % interval {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    parser = engine_parser(__doc__, prompts=100, batch=8)
    parser.add_argument("--runs", type=int, default=3)
    compare(parser.parse_args())

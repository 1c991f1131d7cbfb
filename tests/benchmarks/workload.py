"""The work that the benchmarks share: completions of numbered prompts under the policy, and Specmill doing it.

What Specmill does here is the first half of the flow's step `complete and judge`: plan, draw, gate, write, commit.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scale import SPECS, write_prompts

from cluster.chat import Turn
from cluster.engine import Sampling
from flows.config import RunRequest
from flows.lines import Lines
from flows.opening import prepare
from flows.workspace import Workspace
from tasks import complete
from tasks.compose import generator_turns
from tasks.progress import Progress
from tasks.prompts import Message
from tasks.wanted import Wanted
from tasks.work import work


@dataclass(frozen=True)
class Request:
    """One request, as Specmill makes it."""

    category: str
    turns: Sequence[Turn]
    sampling: Sampling


@dataclass(frozen=True)
class Result:
    """What was made, in which time. `idle` and `tail` are shares of it, as a run reports them."""

    rows: int
    tokens: int
    seconds: float
    idle: float = 0.0
    tail: float = 0.0


def engine_parser(description: str, prompts: int, batch: int) -> argparse.ArgumentParser:
    """The options of what starts vLLM: how much of it, and how it is configured."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=prompts, help="prompts of a turn; two completions are drawn of each")
    parser.add_argument("--model", default="default", help="`default`, a checkpoint directory or a hub id")
    parser.add_argument("--dtype", default="float32", help="precision of the weights")
    parser.add_argument("--engines", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each engine")
    parser.add_argument("--batch", type=int, default=batch, help="requests that an engine works on at the same time")
    return parser


def engine_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine of a run file, as the options say."""
    names = {"max_num_seqs": arguments.batch, "max_model_len": 4096, "kv_cache_gib": 1.25}
    return {name: getattr(arguments, name) for name in ("model", "dtype", "engines", "gpus")} | names


def write_run(folder: Path, prompts: int, engine: dict[str, Any], **generate: Any) -> Path:
    """A run file for so many prompts, and their file; nothing is compared for overlap. Returns the run file."""
    (folder / "prompts").mkdir(parents=True)
    write_prompts(folder / "prompts" / "prompts.jsonl", 0, prompts)
    content = {
        "version": 1,
        "root": str(folder / "root"),
        "policy": str(SPECS / "policies" / "base"),
        "prompts": str(folder / "prompts"),
        "overlap": {"duplicates": "off", "contamination": "off"},
        "generate": {"engine": engine, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800, **generate},
        "judge": {"engine": engine},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def fresh(file: Path, number: int) -> Workspace:
    """The run with seeds of its own, in a root of its own: nothing of another run is there."""
    request = RunRequest(file=str(file), root=str(file.parent / f"root-{number}"), changes=[f"generate.seed={number}"])
    return prepare(request, trains=False)


def requests_of(run: Workspace) -> list[Request]:
    """What Specmill will ask, in its order."""
    config, found = run.config.generate, []
    for part, pairs in Wanted.of(run.prompts, "sft", run.requests, config.n, 1).missing_completions():
        asked, rows = run.requests[part.category], run.store.read_table(part.path, ["prompt_hash", "messages"]).to_pylist()
        for row, sample in pairs:
            messages = [Message.model_validate(turn) for turn in rows[row]["messages"]]
            turns = generator_turns(asked.spec, messages, config.placement, apart=not run.generator.model.here)
            seed = complete.seed_of(config.seed, rows[row]["prompt_hash"], sample)
            sampling = Sampling(config.temperature, config.max_tokens, seed, grammar=asked.grammar)
            found.append(Request(part.category, turns, sampling))
    return found


def specmill(run: Workspace) -> Result:
    """Specmill's way. The engines start before the clock does; it stops when the last row is in the ledger."""
    engines = run.config.generate.engine.engines
    run.generator.fleet()
    with Progress("complete", "completions") as drawn, Progress("judge", "judgements") as judged:
        started = time.monotonic()
        lines = Lines(run, drawn, judged)
        with lines.drawn.ledger.writing(run.config.lease_seconds):
            wall = work({lines.drawing: lines.drawn})
            lines.drawn.balance()
            seconds = time.monotonic() - started
    tally = lines.drawn
    if tally.quarantined:
        raise RuntimeError(f"{tally.quarantined} rows were quarantined")
    idle = max(0.0, 1 - tally.usage.busy_seconds / (engines * wall.seconds))
    return Result(tally.made, tally.usage.completion_tokens, seconds, idle, wall.tail / wall.seconds)

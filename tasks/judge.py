"""k-sample judging: the same spec(category), k independent runs, every raw verdict kept, the minimum decides (Guan et al., section 2.3.2).

An answer that cannot be parsed is missing data: it is asked again with another seed and, if that does not help, the run is quarantined
and the row has no score. Sub-scores are integers 1 to 5; a run's score is the minimum of its sub-scores, a row's that of its k runs.
"""

import asyncio
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from cluster.engine import Engine, EngineConfig, Sampling
from cluster.fleet import Stage
from cluster.models import Model
from tasks import tables
from tasks.complete import seed_of, template_of
from tasks.compose import JUDGE_TEMPLATE_HASH, SUBSCORES_BLIND, SUBSCORES_FULL, BlindCase, FullCase, judge_turns
from tasks.keys import digest, judgement_key
from tasks.keyset import Keys, keys_of
from tasks.policy import Spec
from tasks.prompts import Message
from tasks.store import Store
from tasks.validation import Strict
from tasks.work import Pairs, Receipt

STAGE = "judgements"
LOWEST, HIGHEST = 1, 5
NAME = ["key", "content", "prompt_id", "category"]
CASE = [*NAME, "messages", "thought", "answer"]
"""Columns of a completion that name it, and those that a judge is shown besides."""
RETRY_SEEDS = 1000
"""How far apart the seeds of a run's attempts are; as many as there can be runs."""


class JudgeConfig(Strict):
    """Who judges, and how often."""

    engine: EngineConfig = Field(EngineConfig(), title="Judge", description="Named apart from the generator, even when it is the same.")
    k: int = Field(3, ge=1, le=1000, title="Runs", description="Independent runs per row; the minimum decides.")
    temperature: float = Field(0.7, gt=0, le=2, title="Temperature", description="Above 0: at 0 all runs are one run.")
    seed: int = Field(0, ge=0, title="Seed", description="Base of the seeds of the runs.")
    attempts: int = Field(3, ge=1, title="Attempts", description="Tries per run before an unparsable verdict is quarantined.")
    sequential: bool = Field(
        True, title="Sequential", description="Judge a completion run by run, and stop at the first score below its threshold."
    )
    overlap: bool = Field(
        True,
        title="Overlap",
        description="Judge while completions are drawn; off: when they are, by engines that start then.",
    )
    audit_share: float = Field(
        0.1, ge=0, le=1, title="Audit share", description="Completions judged k times in any case, so that agreement can be estimated."
    )


@dataclass(frozen=True)
class Verdict:
    """One judge run. `scores` is None when no attempt could be parsed; `raw` holds the text of every attempt, `seed` is the first's."""

    scores: dict[str, int] | None
    raw: tuple[str, ...]
    seed: int

    @property
    def score(self) -> int | None:
        """The minimum of the sub-scores."""
        return min(self.scores.values()) if self.scores else None


@dataclass(frozen=True)
class JudgementShard:
    """A unit of work: rows of one completion shard, and which runs of the judge are wanted of each."""

    root: str
    model: Model
    config: JudgeConfig
    judge_hash: str
    spec: Spec
    source: str
    pairs: Pairs
    limit: int
    """Threshold of the category: no run after a score below it is needed."""

    @property
    def at_once(self) -> int:
        """Requests that it makes at the same time, but for audited rows."""
        return len(np.unique(self.pairs.rows)) if self.config.sequential else len(self.pairs)


def judge_hash(model: Model, config: JudgeConfig, view: str) -> str:
    """Digest of everything that makes a judge's verdict, beside the material: model, revision, template, sampling, view."""
    sampling = {"temperature": config.temperature, "seed": config.seed, "attempts": config.attempts, **config.engine.identity(held=True)}
    return digest([model.id, model.revision, template_of(model), JUDGE_TEMPLATE_HASH, sampling, view])


async def judge(engine: Engine, spec: Spec, case: FullCase | BlindCase, config: JudgeConfig, name: str, run: int) -> Verdict:
    """One run of the judge on one case; `name`, a hexadecimal hash, and the run give the seed.

    The order of the sub-scores rotates with the run, against position bias. Raises ValueError when the case has no room in the context.
    """
    subscores = SUBSCORES_FULL if isinstance(case, FullCase) else SUBSCORES_BLIND
    shift = run % len(subscores)
    order = subscores[shift:] + subscores[:shift]
    turns, length = judge_turns(spec, case, order), 4 * len(order) + 4
    raw: list[str] = []
    for attempt in range(config.attempts):
        seed = seed_of(config.seed, name, run + RETRY_SEEDS * attempt)
        sampling = Sampling(config.temperature, length, seed, json_schema=_schema(len(order)))
        raw.append((await engine.complete(turns, sampling)).text)
        scores = parse_scores(raw[-1], order)
        if scores:
            break
    return Verdict(scores, tuple(raw), seed_of(config.seed, name, run))


def parse_scores(raw: str, order: tuple[str, ...]) -> dict[str, int] | None:
    """Sub-scores of a judge's answer, or None when it is not exactly the list that was asked for."""
    try:
        grades = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(grades, list) or len(grades) != len(order):
        return None
    if not all(type(grade) is int and LOWEST <= grade <= HIGHEST for grade in grades):
        return None
    return dict(zip(order, grades, strict=True))


def audited(keys: Keys, config: JudgeConfig) -> npt.NDArray[np.bool_]:
    """Which completions are judged k times whatever their first runs say: a share that their keys choose."""
    if not config.sequential:
        return np.ones(len(keys), np.bool_)
    chance = keys.view(">u4").reshape(len(keys), -1)[:, 0] if len(keys) else np.zeros(0)
    return np.asarray(chance < config.audit_share * 2**32)


async def judge_shard(engine: Engine, shard: JudgementShard) -> Receipt:
    """Judges the completions of a shard and writes one row per run."""

    async def judge_row(row: dict[str, Any], runs: list[int]) -> list[dict[str, Any]]:
        if audited(keys_of([row["key"]]), shard.config)[0]:
            return list(await asyncio.gather(*(_judge_row(engine, shard, row, run) for run in runs)))
        given: list[dict[str, Any]] = []
        for run in runs:
            given.append(await _judge_row(engine, shard, row, run))
            if (given[-1].get("score") or HIGHEST) < shard.limit:
                break
        return given

    completions = await asyncio.to_thread(_completions, shard, CASE)
    judged = await asyncio.gather(*(judge_row(row, runs) for row, runs in completions))
    return await asyncio.to_thread(_write, shard, [row for given in judged for row in given])


def give_up(shard: JudgementShard, reason: str) -> Receipt:
    """Writes the rows of a shard that cannot be run, all of them quarantined."""
    named = [(row, run) for row, runs in _completions(shard, NAME) for run in runs]
    return _write(shard, [_row(shard, row, run) | {"seed": 0, "quarantined": reason} for row, run in named])


JUDGE = Stage(
    run=judge_shard,
    size=lambda shard: shard.at_once,
    prefix=lambda shard: shard.spec.hash,
    split=lambda shard: [replace(shard, pairs=half) for half in shard.pairs.halves()],
    give_up=give_up,
)


def _completions(shard: JudgementShard, columns: list[str]) -> list[tuple[dict[str, Any], list[int]]]:
    """The completions of a shard with the runs wanted of each."""
    runs: dict[int, list[int]] = {}
    for place, run in shard.pairs:
        runs.setdefault(place, []).append(run)
    rows = Store(shard.root).read_table(shard.source, columns).take(list(runs)).to_pylist()
    return list(zip(rows, runs.values(), strict=True))


def _write(shard: JudgementShard, rows: list[dict[str, Any]]) -> Receipt:
    file = Store(shard.root).put_table(f"{STAGE}/shards", pa.Table.from_pylist(rows, schema=tables.JUDGEMENTS))
    return Receipt(file, skipped=len(shard.pairs) - len(rows))


def _row(shard: JudgementShard, row: dict[str, Any], run: int) -> dict[str, Any]:
    """What is known of a judgement of a completion before it is given."""
    return {
        "key": judgement_key(row["key"], row["content"], shard.judge_hash, run),
        "completion_key": row["key"],
        "content": row["content"],
        "prompt_id": row["prompt_id"],
        "category": row["category"],
        "run": run,
        "view": "full",
        "spec_hash": shard.spec.hash,
        "judge": shard.model.id,
        "judge_revision": shard.model.revision,
        "judge_hash": shard.judge_hash,
    }


async def _judge_row(engine: Engine, shard: JudgementShard, row: dict[str, Any], run: int) -> dict[str, Any]:
    messages = tuple(Message.model_validate(turn) for turn in row["messages"])
    result = _row(shard, row, run)
    try:
        case = FullCase(messages, row["thought"], row["answer"])
        verdict = await judge(engine, shard.spec, case, shard.config, row["key"].hex(), run)
    except ValueError as error:
        return result | {"seed": 0, "quarantined": f"the engine gave no verdict: {error}"}
    result |= {"seed": verdict.seed, "raw": list(verdict.raw)}
    if verdict.scores is None:
        return result | {"quarantined": f"verdict not parsable after {len(verdict.raw)} attempts"}
    return result | verdict.scores | {"score": verdict.score}


@lru_cache(maxsize=8)
def _schema(length: int) -> str:
    grade = {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))}
    return json.dumps({"type": "array", "prefixItems": [grade] * length, "items": False, "minItems": length, "maxItems": length})

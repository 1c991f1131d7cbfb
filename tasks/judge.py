"""k-sample judging: the same spec(category), k independent runs, every raw verdict kept, the minimum decides (Guan et al., section 2.3.2).

An answer that cannot be parsed is missing data: it is asked again with another seed and, if that does not help, the run is quarantined
and the row has no score. Sub-scores are integers 1 to 5; a run's score is the minimum of its sub-scores, a row's that of its k runs.
"""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import Field

from cluster.chat import Chat
from cluster.engine import Engine, EngineConfig, Sampling
from cluster.errors import SpecmillError
from cluster.models import Model
from cluster.pool import Pool
from tasks import tables
from tasks.complete import chat_of, require_room, seed_of
from tasks.compose import JUDGE_TEMPLATE_HASH, SUBSCORES_BLIND, SUBSCORES_FULL, BlindCase, FullCase, judge_turns
from tasks.keys import digest, judgement_key
from tasks.policy import Spec
from tasks.progress import Progress
from tasks.prompts import Prompt
from tasks.store import Ledger, Shard, Store
from tasks.validation import Strict

STAGE = "judgements"
LOWEST, HIGHEST = 1, 5
RETRY_SEEDS = 1000
"""How far apart the seeds of a run's attempts are; more than there are runs."""


class JudgeConfig(Strict):
    """Who judges, and how often."""

    engine: EngineConfig = Field(EngineConfig(), title="Judge", description="Named apart from the generator, even when it is the same.")
    k: int = Field(3, ge=1, title="Runs", description="Independent runs per row; the minimum decides.")
    temperature: float = Field(0.7, gt=0, le=2, title="Temperature", description="Above 0: at 0 all runs are one run.")
    seed: int = Field(0, ge=0, title="Seed", description="Base of the seeds of the runs.")
    attempts: int = Field(3, ge=1, title="Attempts", description="Tries per run before an unparsable verdict is quarantined.")


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
    """A unit of work: completions of one shard; `runs` says which to judge, as answers to which prompt, and the run numbers."""

    root: str
    model: Model
    config: JudgeConfig
    judge_hash: str
    spec: Spec
    source: str
    runs: dict[bytes, tuple[Prompt, tuple[int, ...]]]


def judge_hash(model: Model, config: JudgeConfig, chat: Chat, view: str) -> str:
    """Digest of everything that makes a judge's verdict, beside the material: model, revision, template, sampling, view."""
    context = config.engine.max_model_len
    sampling = {"temperature": config.temperature, "seed": config.seed, "attempts": config.attempts, "context": context}
    return digest([model.id, model.revision, chat.hash, JUDGE_TEMPLATE_HASH, sampling, view])


async def judge(engine: Engine, chat: Chat, spec: Spec, case: FullCase | BlindCase, config: JudgeConfig, name: str, run: int) -> Verdict:
    """One run of the judge on one case; `name`, a hexadecimal hash, and the run give the seed.

    The order of the sub-scores rotates with the run, against position bias. Raises ValueError when the case has no room in the context.
    """
    subscores = SUBSCORES_FULL if isinstance(case, FullCase) else SUBSCORES_BLIND
    shift = run % len(subscores)
    order = subscores[shift:] + subscores[:shift]
    ids = chat.prompt(judge_turns(spec, case, order))
    length = 4 * len(order) + 4
    require_room(len(ids), length, config.engine)
    raw: list[str] = []
    for attempt in range(config.attempts):
        seed = seed_of(config.seed, name, run + RETRY_SEEDS * attempt)
        sampling = Sampling(config.temperature, length, seed, json_schema=_schema(len(order)))
        raw.append(chat.decode((await engine.complete(ids, sampling)).token_ids))
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


def wanted(completions: Iterable[bytes], judge_digest: str, k: int) -> dict[bytes, tuple[bytes, int]]:
    """Judgement key -> (completion key, run number)."""
    return {judgement_key(key, judge_digest, run): (key, run) for key in completions for run in range(k)}


async def judge_shard(engine: Engine, shard: JudgementShard) -> Shard:
    """Judges the completions of a shard and writes one row per run; returns the receipt."""
    store = Store(shard.root)
    chat = chat_of(shard.model.path)
    jobs = []
    for row in store.read_table(shard.source).to_pylist():
        if row["key"] in shard.runs:
            prompt, runs = shard.runs[row["key"]]
            jobs += [_judge_row(engine, chat, shard, prompt, row, run) for run in runs]
    rows = await asyncio.gather(*jobs)
    return store.put_table(f"{STAGE}/shards", pa.Table.from_pylist(list(rows), schema=tables.JUDGEMENTS))


def judge_all(pool: Pool, ledger: Ledger, shards: list[JudgementShard], lost: list[str], progress: Progress) -> None:
    """Runs shards on the pool and commits each receipt. `lost` shards are declared gone in the first entry.

    Raises SpecmillError unless every run that was asked for is committed or quarantined.
    """
    total = sum(len(runs) for shard in shards for _, runs in shard.runs.values())
    done = 0
    if lost:
        ledger.commit([], lost)
    for _, receipt in pool.map(judge_shard, shards, total, lambda shard: shard.spec.hash):
        ledger.commit([receipt])
        done += receipt.rows
        progress(done, total)
    if done != total:
        raise SpecmillError(f"{STAGE}: {total} rows were asked for, {done} were written")


async def _judge_row(engine: Engine, chat: Chat, shard: JudgementShard, prompt: Prompt, row: dict[str, Any], run: int) -> dict[str, Any]:
    case = FullCase(prompt.messages, row["thought"], row["answer"])
    result = {
        "key": judgement_key(row["key"], shard.judge_hash, run),
        "completion_key": row["key"],
        "prompt_id": prompt.id,
        "category": row["category"],
        "run": run,
        "view": "full",
        "spec_hash": shard.spec.hash,
        "judge": shard.model.id,
        "judge_revision": shard.model.revision,
        "judge_hash": shard.judge_hash,
    }
    try:
        verdict = await judge(engine, chat, shard.spec, case, shard.config, row["key"].hex(), run)
    except ValueError as error:
        return result | {"seed": 0, "quarantined": f"engine refused the request: {error}"}
    result |= {"seed": verdict.seed, "raw": list(verdict.raw)}
    if verdict.scores is None:
        return result | {"quarantined": f"verdict not parsable after {len(verdict.raw)} attempts"}
    return result | verdict.scores | {"score": verdict.score}


def _schema(length: int) -> str:
    grade = {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))}
    return json.dumps({"type": "array", "prefixItems": [grade] * length, "items": False, "minItems": length, "maxItems": length})

"""k-sample judging: the same spec(category), k independent runs, every raw verdict kept, the minimum decides (Guan et al., section 2.3.2).

An answer that cannot be parsed is missing data: it is asked again with another seed and, if that does not help, the run is quarantined
and the row has no score. Sub-scores are integers 1 to 5; a run's score is the minimum of its sub-scores, a row's that of its k runs.
"""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from pydantic import Field

from cluster.chat import Chat
from cluster.engine import Engine, EngineConfig, Sampling
from cluster.fleet import Stage
from cluster.models import Model
from tasks import tables
from tasks.complete import chat_of, require_room, seed_of
from tasks.compose import JUDGE_TEMPLATE_HASH, SUBSCORES_BLIND, SUBSCORES_FULL, BlindCase, FullCase, judge_turns
from tasks.keys import digest, judgement_key
from tasks.policy import Spec
from tasks.prompts import Prompt
from tasks.store import Shard, Store
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
    sequential: bool = Field(
        True, title="Sequential", description="Judge a completion run by run, and stop at the first score below its threshold."
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
    """A unit of work: completions of one shard; `runs` says which to judge, as answers to which prompt, and the run numbers."""

    root: str
    model: Model
    config: JudgeConfig
    judge_hash: str
    spec: Spec
    source: str
    runs: dict[bytes, tuple[Prompt, tuple[int, ...]]]
    limit: int
    """Threshold of the category: no run after a score below it is needed."""


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


def missing_runs(
    store: Store, shards: Iterable[Shard], wanted: dict[bytes, tuple[bytes, int]], limits: dict[bytes, int], config: JudgeConfig
) -> dict[bytes, list[int]]:
    """Completion -> runs to make: those that are wanted, not in the shards, and, unless audited, not after a score below the limit."""
    lowest: dict[bytes, int] = {}
    done: set[bytes] = set()
    for shard in shards:
        for row in store.read_table(shard.path, ["key", "completion_key", "score"]).to_pylist():
            if row["key"] in wanted:
                done.add(row["key"])
                if row["score"] is not None:
                    lowest[row["completion_key"]] = min(row["score"], lowest.get(row["completion_key"], HIGHEST))
    missing: dict[bytes, list[int]] = {}
    for key, (completion, run) in wanted.items():
        settled = lowest.get(completion, HIGHEST) < limits[completion] and not audited(completion, config)
        if key not in done and not settled:
            missing.setdefault(completion, []).append(run)
    return missing


def audited(completion: bytes, config: JudgeConfig) -> bool:
    """Whether a completion is judged k times whatever its first runs say: a share that its key chooses."""
    return not config.sequential or int.from_bytes(completion[:4], "big") < config.audit_share * 2**32


async def judge_shard(engine: Engine, shard: JudgementShard) -> Shard:
    """Judges the completions of a shard and writes one row per run; returns the receipt."""
    store = Store(shard.root)
    chat = chat_of(shard.model.path)

    async def judge_row(row: dict[str, Any]) -> list[dict[str, Any]]:
        prompt, runs = shard.runs[row["key"]]
        if audited(row["key"], shard.config):
            return list(await asyncio.gather(*(_judge_row(engine, chat, shard, prompt, row, run) for run in runs)))
        given: list[dict[str, Any]] = []
        for run in runs:
            given.append(await _judge_row(engine, chat, shard, prompt, row, run))
            if (given[-1].get("score") or HIGHEST) < shard.limit:
                break
        return given

    source = store.read_table(shard.source).to_pylist()
    judged = await asyncio.gather(*(judge_row(row) for row in source if row["key"] in shard.runs))
    rows = [row for given in judged for row in given]
    receipt = store.put_table(f"{STAGE}/shards", pa.Table.from_pylist(rows, schema=tables.JUDGEMENTS))
    return replace(receipt, skipped=sum(len(runs) for _, runs in shard.runs.values()) - len(rows))


def split(shard: JudgementShard) -> list[JudgementShard]:
    """Two halves, by completions or, of a single one, by runs; a single run comes back alone."""
    items = list(shard.runs.items())
    half = len(items) // 2
    if half:
        return [replace(shard, runs=dict(items[:half])), replace(shard, runs=dict(items[half:]))]
    key, (prompt, numbers) = items[0]
    half = len(numbers) // 2
    parts = (numbers[:half], numbers[half:]) if half else (numbers,)
    return [replace(shard, runs={key: (prompt, part)}) for part in parts]


def give_up(shard: JudgementShard, reason: str) -> Shard:
    """Writes the rows of a shard that cannot be run, all of them quarantined."""
    named = [(key, prompt, run) for key, (prompt, runs) in shard.runs.items() for run in runs]
    rows = [_row(shard, key, prompt, run) | {"seed": 0, "quarantined": reason} for key, prompt, run in named]
    return Store(shard.root).put_table(f"{STAGE}/shards", pa.Table.from_pylist(rows, schema=tables.JUDGEMENTS))


JUDGE = Stage(
    run=judge_shard,
    size=lambda shard: sum(len(runs) for _, runs in shard.runs.values()),
    prefix=lambda shard: shard.spec.hash,
    split=split,
    give_up=give_up,
)


def _row(shard: JudgementShard, completion: bytes, prompt: Prompt, run: int) -> dict[str, Any]:
    """What is known of a judgement before it is given."""
    return {
        "key": judgement_key(completion, shard.judge_hash, run),
        "completion_key": completion,
        "prompt_id": prompt.id,
        "category": prompt.category,
        "run": run,
        "view": "full",
        "spec_hash": shard.spec.hash,
        "judge": shard.model.id,
        "judge_revision": shard.model.revision,
        "judge_hash": shard.judge_hash,
    }


async def _judge_row(engine: Engine, chat: Chat, shard: JudgementShard, prompt: Prompt, row: dict[str, Any], run: int) -> dict[str, Any]:
    case = FullCase(prompt.messages, row["thought"], row["answer"])
    result = _row(shard, row["key"], prompt, run)
    try:
        verdict = await judge(engine, chat, shard.spec, case, shard.config, row["key"].hex(), run)
    except ValueError as error:
        return result | {"seed": 0, "quarantined": f"the engine gave no verdict: {error}"}
    result |= {"seed": verdict.seed, "raw": list(verdict.raw)}
    if verdict.scores is None:
        return result | {"quarantined": f"verdict not parsable after {len(verdict.raw)} attempts"}
    return result | verdict.scores | {"score": verdict.score}


def _schema(length: int) -> str:
    grade = {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))}
    return json.dumps({"type": "array", "prefixItems": [grade] * length, "items": False, "minItems": length, "maxItems": length})

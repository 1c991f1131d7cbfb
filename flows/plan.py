"""`specmill plan`: what a run would do and why, without doing it. Reads ledgers and shards, starts nothing, writes nothing."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.engine import EngineConfig
from cluster.serving import Usage
from flows.workspace import Workspace
from tasks import complete, judge
from tasks.complete import Request
from tasks.dataset import gather
from tasks.prompts import Prompt, prompt_hash
from tasks.store import Ledger, Shard, Store

ORIGINS = ["prompt_hash", "sample", "spec_hash", "template_hash", "sampling_hash", "generator", "generator_revision"]


@dataclass
class Line:
    """One stage of one category: rows wanted, rows that are there, and why the others have to be made."""

    stage: str
    category: str
    wanted: int = 0
    reused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def to_do(self) -> int:
        """Rows to make."""
        return self.wanted - self.reused


@dataclass(frozen=True)
class Estimate:
    """What a stage's work will cost, judged by what its rows cost so far; None when there are none."""

    stage: str
    rows: int
    usage: Usage | None
    engines: int


def plan(run: Workspace) -> tuple[list[Line], list[Estimate]]:
    """The lines of both stages by category, and what they will cost."""
    ledger = Ledger(run.store, complete.STAGE)
    here, _ = ledger.survey()
    wanted = complete.wanted(run.split("sft"), run.requests, run.config.generate.n)
    done = run.store.keys(here, set(wanted))
    lines = {category: Line("complete", category) for category in run.policy.categories}
    missing = []
    for key, (prompt, sample) in wanted.items():
        line = lines[prompt.category]
        line.wanted += 1
        line.reused += key in done
        if key not in done:
            missing.append((prompt, sample))
    for (prompt, _), reason in zip(missing, _reasons(run.store, here, missing, run.requests), strict=True):
        lines[prompt.category].reasons[reason] += 1
    judged = _judge_lines(run, here, wanted, done)
    return [*lines.values(), *judged.values()], [
        _estimate(ledger, lines.values(), run.config.generate.engine),
        _estimate(Ledger(run.store, judge.STAGE), judged.values(), run.config.judge.engine),
    ]


def describe_plan(lines: Iterable[Line], estimates: Iterable[Estimate]) -> str:
    """The plan as two tables for the terminal."""
    rows = [["stage", "category", "wanted", "reused", "to do", "why"]]
    for line in lines:
        why = ", ".join(f"{count} {reason}" for reason, count in line.reasons.most_common())
        rows.append([line.stage, line.category, str(line.wanted), str(line.reused), str(line.to_do), why])
    return "\n".join([*_table(rows), "", *map(_sentence, estimates)])


def _judge_lines(run: Workspace, here: list[Shard], wanted: dict[bytes, tuple[Prompt, int]], done: set[bytes]) -> dict[str, Line]:
    """Verdicts wanted of the completions that are there, and, for those to come, as many as if all passed the gates."""
    lines = {category: Line("judge", category) for category in run.policy.categories}
    k = run.config.judge.k
    there = {key: wanted[key] for key in wanted if key in done}
    rows, dropped = gather(run.store, here, there, run.policy, run.specs, run.config.gates)
    passed = {row["key"]: row["category"] for row in rows if row["key"] not in dropped}
    runs = judge.wanted(passed, run.judge_hash("full"), k)
    shards = Ledger(run.store, judge.STAGE).survey()[0]
    limits = {key: run.config.select.limit(category) for key, category in passed.items()}
    missing = judge.missing_runs(run.store, shards, runs, limits, run.config.judge)
    known = _judged_before(run.store, shards, set(missing), run.judge_hash("full"))
    for completion, category in passed.items():
        to_make = len(missing.get(completion, ()))
        lines[category].wanted += k
        lines[category].reused += k - to_make
        if to_make:
            lines[category].reasons[known.get(completion, "new completion")] += to_make
    for key, (prompt, _) in wanted.items():
        if key not in done:
            lines[prompt.category].wanted += k
            lines[prompt.category].reasons["of completions to come"] += k
    return lines


def _reasons(store: Store, shards: list[Shard], missing: list[tuple[Prompt, int]], asked: dict[str, Request]) -> list[str]:
    """Why each missing completion is not there: the first part of its key in which the nearest older one differs."""
    names = {prompt_hash(prompt.messages) for prompt, _ in missing}
    older: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for shard in shards if names else []:
        for row in store.read_table(shard.path, ORIGINS).to_pylist():
            if row["prompt_hash"] in names:
                older[row["prompt_hash"]].append(row)
    return [_reason(older[prompt_hash(prompt.messages)], sample, asked[prompt.category]) for prompt, sample in missing]


def _reason(older: list[dict[str, Any]], sample: int, asked: Request) -> str:
    if not older:
        return "new prompt"
    same = [row for row in older if row["sample"] == sample]
    if not same:
        return "more samples"
    changes = [
        [
            name
            for name, differs in (
                ("spec", row["spec_hash"] != asked.spec.hash),
                ("model", (row["generator"], row["generator_revision"]) != (asked.model.id, asked.model.revision)),
                ("template", row["template_hash"] != asked.template),
                ("sampling", row["sampling_hash"] != asked.sampling),
            )
            if differs
        ]
        for row in same
    ]
    nearest = min(changes, key=len)
    return f"{' and '.join(nearest)} changed" if nearest else "lost"


def _judged_before(store: Store, shards: list[Shard], completions: set[bytes], judge_digest: str) -> dict[bytes, str]:
    """Completion -> why verdicts of it are missing although it was judged before."""
    found: dict[bytes, str] = {}
    for shard in shards:
        for row in store.read_table(shard.path, ["completion_key", "judge_hash"]).to_pylist():
            if row["completion_key"] in completions:
                same = row["judge_hash"] == judge_digest
                found[row["completion_key"]] = "more runs" if same else found.get(row["completion_key"], "judge changed")
    return found


def _estimate(ledger: Ledger, lines: Iterable[Line], engine: EngineConfig) -> Estimate:
    rows = made = 0
    usage = Usage()
    for entry in ledger.entries():
        cost = Usage(**entry["usage"])
        if cost.busy_seconds:
            made += sum(shard["rows"] for shard in entry["shards"])
            usage += cost
    rows = sum(line.to_do for line in lines)
    return Estimate(ledger.stage, rows, usage.scaled(rows / made) if made else None, engine.engines)


def _sentence(estimate: Estimate) -> str:
    if not estimate.rows:
        return f"{estimate.stage}: nothing to do"
    if estimate.usage is None:
        return f"{estimate.stage}: {estimate.rows} rows to make; nothing was made under this root before, so their cost is not known"
    cost = estimate.usage
    minutes = cost.busy_seconds / estimate.engines / 60
    return (
        f"{estimate.stage}: {estimate.rows} rows, about {cost.prompt_tokens:,} prompt tokens ({cost.cached_tokens:,} cached) and "
        f"{cost.completion_tokens:,} to draw, {minutes:,.1f} minutes on {estimate.engines} engines at the speed so far"
    )


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

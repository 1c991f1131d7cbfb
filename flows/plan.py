"""`specmill plan`: what a run would do and why, without doing it. Reads prompts, ledgers and shards, and starts nothing."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.engine import EngineConfig
from cluster.serving import Usage
from flows.checks import host_outside
from flows.config import RunConfig
from flows.terminal import aligned
from flows.workspace import Workspace, survey
from tasks import complete, judge
from tasks.complete import Request
from tasks.keyset import KeySet, column_keys
from tasks.ledger import Ledger
from tasks.prompts import Split
from tasks.stage_config import OfflineConfig
from tasks.wanted import Wanted

ORIGINS = ["prompt_hash", "sample", "spec_hash", "template_hash", "sampling_hash", "generator", "generator_revision"]
Changes = tuple[bool, bool, bool, bool]
CHANGES = ("spec", "model", "template", "sampling")


@dataclass
class Line:
    """One stage of one category: rows wanted, rows that are there, and why the others have to be made."""

    stage: str
    category: str
    wanted: int = 0
    reused: int = 0
    skipped: int = 0
    """Runs that an earlier score made needless."""
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def to_do(self) -> int:
        """Rows to make."""
        return self.wanted - self.reused - self.skipped


@dataclass(frozen=True)
class Estimate:
    """What a stage's work will cost, as the last run's rows did; None when there are none. `price`: in money, of an endpoint."""

    stage: str
    rows: int
    usage: Usage | None
    engines: int
    price: float | None = None


@dataclass(frozen=True)
class Leaving:
    """What would leave this machine or cluster for a host, counted by category."""

    stage: str
    what: str
    host: str
    counts: dict[str, int]


def plan(run: Workspace) -> tuple[list[Line], list[Estimate], list[Leaving], list[str]]:
    """The lines of both stages by category, what they will cost, what would leave this machine, and what each stage of training learns."""
    completions, judgements = Ledger(run.store, complete.STAGE), Ledger(run.store, judge.STAGE)
    wanted, _ = survey(run, completions, judgements)
    lines = [*_complete_lines(run, wanted, completions), *_judge_lines(run, wanted, judgements)]
    estimates = [
        _estimate(completions, int((~wanted.made).sum()), run.config.generate.engine),
        _estimate(judgements, _runs_to_make(run, wanted), run.config.judge.engine),
    ]
    return lines, estimates, _leaving(run, lines), _training(run.config)


def describe_plan(lines: Iterable[Line], estimates: Iterable[Estimate], leaving: Iterable[Leaving], training: Iterable[str]) -> str:
    """The plan for the terminal: a table, what would leave this machine, what it will cost, and what is trained afterwards."""
    rows = [["stage", "category", "wanted", "reused", "skipped", "to do", "why"]]
    for line in lines:
        why = ", ".join(f"{count} {reason}" for reason, count in line.reasons.most_common())
        rows.append([line.stage, line.category, str(line.wanted), str(line.reused), str(line.skipped), str(line.to_do), why])
    left = [
        f"{sent.stage}: {sent.what.format(sum(sent.counts.values()))} would leave this machine for {sent.host}: "
        + ", ".join(f"{count} {category}" for category, count in sent.counts.items())
        for sent in leaving
    ]
    return "\n".join([*aligned(rows), "", *(left or ["nothing would leave this machine"]), *map(_sentence, estimates), *training])


def _leaving(run: Workspace, lines: list[Line]) -> list[Leaving]:
    """What the stages of this plan send, and what training and evaluation would have judged."""
    sent = []
    for stage, engine in (("complete", run.config.generate.engine), ("judge", run.config.judge.engine)):
        rows = Counter({line.category: line.to_do for line in lines if line.stage == stage})
        sent.append((stage, "{} rows", host_outside(engine), rows))
    judge, rl, trains_rl = run.config.judge.engine, run.config.rl, "rl" in run.config.train
    shown: list[tuple[str, Split, EngineConfig | None]] = [
        ("train", "rl", judge if rl.asks_judge and trains_rl else None),
        ("train", "rl", rl.held_out if trains_rl else None),
        ("evaluate", "eval", judge),
    ]
    for flow, split, reader in shown:
        prompts: Counter[str] = Counter()
        for part in run.prompts.parts:
            prompts[part.category] += part.splits[split]
        if reader:
            sent.append((flow, f"answers to {{}} prompts of the {split} split", host_outside(reader), prompts))
    return [Leaving(stage, what, host, dict(+counts)) for stage, what, host, counts in sent if host and +counts]


def _complete_lines(run: Workspace, wanted: Wanted, ledger: Ledger) -> list[Line]:
    all_rows, made = wanted.count(np.ones(len(wanted))), wanted.count(wanted.made)
    lines = {category: Line("complete", category, all_rows[category], made[category]) for category in all_rows}
    named: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for part, pairs in wanted.missing_completions():
        names = run.store.read_table(part.path, ["prompt_hash"])["prompt_hash"]
        for row, sample in pairs:
            named[names[row].as_py()].append((part.category, sample))
    older: dict[str, list[tuple[int, Changes]]] = defaultdict(list)
    known = np.array(sorted(named), "S64")
    for table in run.store.read_tables(list(ledger.state.shards) if named else [], ORIGINS):
        if table is not None:
            names = np.array(table["prompt_hash"].to_pylist(), "S64")
            here = known[np.minimum(np.searchsorted(known, names), len(known) - 1)] == names
            for row in table.filter(pa.array(here)).to_pylist():
                name = row["prompt_hash"]
                older[name].append((row["sample"], _changes(row, run.requests[named[name][0][0]])))
    for name, missing in named.items():
        for category, sample in missing:
            lines[category].reasons[_reason(older.get(name, []), sample)] += 1
    return list(lines.values())


def _judge_lines(run: Workspace, wanted: Wanted, ledger: Ledger) -> list[Line]:
    """Verdicts wanted of the completions that are there, and, for those to come, as many as if all passed the gates."""
    k = run.config.judge.k
    missing = wanted.missing_runs(run.config.judge, run.limits)
    passed, to_make, to_come = wanted.count(wanted.passed), wanted.count(missing), wanted.count(~wanted.made)
    settled = wanted.count(wanted.settled_runs(missing))
    lines = {category: Line("judge", category, k * (passed[category] + to_come[category])) for category in passed}
    for category, line in lines.items():
        line.skipped = settled[category]
        line.reused = k * passed[category] - to_make[category] - line.skipped
        line.reasons["of completions to come"] += k * to_come[category]
    index = np.flatnonzero(missing.any(axis=1))
    known = _judged_before(run, wanted, index, ledger)
    for number, why in zip(index, known, strict=True):
        lines[wanted.categories[wanted.category[number]]].reasons[why] += int(missing[number].sum())
    for line in lines.values():
        line.reasons += Counter()  # without the reasons that nothing has
    return list(lines.values())


def _runs_to_make(run: Workspace, wanted: Wanted) -> int:
    return int(wanted.missing_runs(run.config.judge, run.limits).sum()) + run.config.judge.k * int((~wanted.made).sum())


def _judged_before(run: Workspace, wanted: Wanted, index: npt.NDArray[np.int64], ledger: Ledger) -> list[str]:
    """Why each of some completions has verdicts to make."""
    by_this, by_another = KeySet(), KeySet()
    for table in run.store.read_tables(list(ledger.state.shards) if len(index) else [], ["completion_key", "judge_hash"]):
        if table is not None:
            mine = pc.equal(table["judge_hash"], run.judge_hash("full")).to_numpy()
            keys = column_keys(table["completion_key"])
            by_this.add(keys[mine])
            by_another.add(keys[~mine])
    same, other = by_this.holds(wanted.keys[index]), by_another.holds(wanted.keys[index])
    return list(np.select([same, other], ["more runs", "judge changed"], "new completion"))


def _changes(row: dict[str, Any], asked: Request) -> Changes:
    """Whether spec, model, template and sampling of a completion differ from what is asked now."""
    return (
        row["spec_hash"] != asked.spec.hash,
        (row["generator"], row["generator_revision"]) != (asked.model.id, asked.model.revision),
        row["template_hash"] != asked.template,
        row["sampling_hash"] != asked.sampling,
    )


def _reason(older: list[tuple[int, Changes]], sample: int) -> str:
    if not older:
        return "new prompt"
    same = [changes for number, changes in older if number == sample]
    if not same:
        return "more samples"
    nearest = [name for name, changed in zip(CHANGES, min(same, key=sum), strict=True) if changed]
    return f"{' and '.join(nearest)} changed" if nearest else "lost"


def _estimate(ledger: Ledger, rows: int, engine: EngineConfig) -> Estimate:
    last = ledger.state.last
    usage = last.usage.scaled(rows / last.made) if last.made else None
    price = engine.remote.cost(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) if engine.remote and usage else None
    return Estimate(ledger.stage, rows, usage, engine.engines, price)


def _sentence(estimate: Estimate) -> str:
    if not estimate.rows:
        return f"{estimate.stage}: nothing to do"
    if estimate.usage is None:
        return f"{estimate.stage}: {estimate.rows} rows to make; nothing was made under this root before, so their cost is not known"
    cost = estimate.usage
    minutes = cost.busy_seconds / estimate.engines / 60
    return (
        f"{estimate.stage}: {estimate.rows} rows, about {cost.prompt_tokens:,} prompt tokens ({cost.cached_tokens:,} cached) and "
        f"{cost.completion_tokens:,} to draw, {minutes:,.1f} minutes on {estimate.engines} engines at the last run's speed"
        + (f", for {estimate.price:,.2f} at the endpoint's prices" if estimate.price is not None else "")
    )


def _training(config: RunConfig) -> list[str]:
    """How much each stage of training learns. How many rows are selected is known only when they are judged."""
    told = []
    for stage in config.train:
        if stage == "rl":
            rl = config.rl
            answers = rl.steps * rl.prompts_per_step * rl.rollouts_per_prompt
            told.append(
                f"rl: {rl.steps} steps of {rl.prompts_per_step} prompts with {rl.rollouts_per_prompt} answers, in all {answers:,} answers "
                f"of at most {rl.max_tokens:,} tokens"
                + (f" and {rl.judge_runs * answers:,} judge runs" if rl.asks_judge else "")
                + (f", without refills, of which a step has up to {rl.refills}" if rl.refills else "")
            )
        else:
            rows: OfflineConfig = getattr(config, stage)
            learnt = {"sft": "rows that are selected", "rejection": "rows that pass the threshold", "dpo": "pairs"}[stage]
            told.append(f"{stage}: {rows.epochs} epochs of the {learnt}, {rows.rows_per_step} a step")
    return told

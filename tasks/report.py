"""The report of a run: what was kept and why, what was trained and how that went, and how the checkpoints compare."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext

from tasks.checkpoints import Checkpoint
from tasks.dataset import NOT_CALIBRATED, Selection
from tasks.evaluate import Evaluation, compare
from tasks.plots import plot
from tasks.progress import say
from tasks.select import funnel_markdown
from tasks.store import Store
from tasks.training_log import read_lines

RATES = {
    "format_adherence": "format without guidance",
    "verdict_accuracy": "verdict as ideal",
    "unsafe_compliance": "unsafe compliance (lower is better)",
    "over_refusal": "over-refusal (lower is better)",
    "policy_retrieval": "cited category matches",
    "not_graded": "no verdict of the judge",
}


def write_report(
    store: Store, manifest: dict[str, Any], selections: list[Selection], checkpoints: list[Checkpoint], evaluations: list[Evaluation]
) -> str:
    """Writes `runs/<id>/report.md`, its pictures and `manifest.json`, shows the summary, returns the run's directory."""
    path = f"runs/{manifest['id']}"
    text = markdown(store, manifest, selections, checkpoints, evaluations)
    for checkpoint in checkpoints:
        if lines := _metrics(checkpoint):
            store.replace(f"{path}/{checkpoint.label}.png", plot(lines, f"{checkpoint.label} ({checkpoint.id})"))
    store.replace(f"{path}/report.md", text.encode())
    store.replace(f"{path}/manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
    if FlowRunContext.get():
        create_markdown_artifact(text, key="report", description=f"Run {manifest['id']}")
    say("\n" + comparison(evaluations) + "\n")
    for name, place in (
        *(("dataset", selection.dataset.path) for selection in selections),
        *((c.label, f"checkpoints/{c.id}/model") for c in checkpoints),
        ("report", f"{path}/report.md"),
    ):
        say(f"  {name:<10} {store.path(place)}")
    return store.path(path)


def markdown(
    store: Store, manifest: dict[str, Any], selections: list[Selection], checkpoints: list[Checkpoint], evaluations: list[Evaluation]
) -> str:
    """The report as Markdown."""
    source = manifest["provenance"]
    by_category = _table(
        ["category", *(evaluation.checkpoint for evaluation in evaluations)],
        [
            [category, *(_rate(evaluation.metrics["verdict_accuracy_by_category"].get(category)) for evaluation in evaluations)]
            for category in evaluations[0].metrics["verdict_accuracy_by_category"]
        ],
    )
    quarantined = "\n".join(f"- `{row['file']}`, line {row['line']}: {row['reason']}" for row in manifest["quarantined"]) or "None."
    return f"""{NOT_CALIBRATED}

# Run {manifest["id"]}

Policy {source["policy"]["id"]} ({source["policy"]["hash"][:12]}),
judge {source["judge"]["id"]} @ {source["judge"]["revision"]} with k = {source["judge"]["k"]}.

## Evaluation

Share of prompts with the 95 % Wilson interval; unguided answers, judged without their thoughts. The judge is told which kind of answer
the policy asks for. Text without any thought is judged as an answer; what holds a thought that was never closed is not judged.

{comparison(evaluations)}

Differences in percentage points, paired by prompt, with the 95 % interval of a bootstrap over scenario groups:

{_differences(store, evaluations)}

Verdict as ideal, by category:

{by_category}

{"".join(map(_selection, selections))}## Checkpoints

{"".join(_checkpoint(item) for item in checkpoints)}
## Prompts that were not used

{quarantined}
"""


def _selection(selection: Selection) -> str:
    dataset = selection.dataset
    generator = dataset.manifest["provenance"]["generator"]
    return f"""## Dataset {dataset.name}@{dataset.version}

Completed by {generator["id"]} @ {generator["revision"]}. Beside the kept rows there are {dataset.manifest["spare"]} spare ones and
{dataset.manifest["preferences"]} preference pairs.

{funnel_markdown(dataset.manifest["funnel"])}

A kept row costs {_cost(selection.cost)}.
{_agreement(selection)}

"""


def _checkpoint(item: Checkpoint) -> str:
    """What it is, what alarmed while it was trained, and its curves."""
    lines = _metrics(item)
    first: dict[str, str] = {}
    for line in lines:
        for name, text in line.get("alarms", ()):
            first.setdefault(name, f"- **alarm {name}**, first at step {line['step']}: {text}\n")
    alarms = "".join(first.values()) + "\n" if first else ""
    curves = f"![{item.label}]({item.label}.png)\n\n" if lines else ""
    return f"### {item.label}\n\n`checkpoints/{item.id}`, weights {item.weights[:12]}\n\n{alarms}{curves}"


def _metrics(item: Checkpoint) -> list[dict[str, Any]]:
    """The lines of its training."""
    folder = Path(item.path or "")
    return read_lines(folder / "metrics.jsonl") or read_lines(folder / "model" / "metrics.jsonl")


def _cost(cost: dict[str, float]) -> str:
    seconds, tokens = cost["engine_seconds_per_kept_row"], cost["tokens_per_kept_row"]
    price = f", {cost['price_per_kept_row']:.3g} at the endpoints' prices" if cost["price_per_kept_row"] else ""
    return f"{seconds:.3g} engine seconds, {tokens:,.0f} drawn tokens{price}; what was spent on rows that were dropped is in it"


def _agreement(selection: Selection) -> str:
    agreed, runs = selection.agreement, selection.dataset.manifest["provenance"]["judge"]["k"]
    if runs < 2 or not agreed["total"]:
        return ""
    return (
        f"On completions that are judged {runs} times in any case, all runs agree to keep or to drop: {_rate(agreed)} of {agreed['total']}."
    )


def comparison(evaluations: list[Evaluation], across: bool = True) -> str:
    """A table of all rates: a column for each checkpoint, or, not `across`, a line."""
    rates = [[_rate(evaluation.metrics[name]) for name in RATES] for evaluation in evaluations]
    labels = [evaluation.checkpoint for evaluation in evaluations]
    if across:
        return _table(["", *labels], [[label, *row] for label, row in zip(RATES.values(), zip(*rates, strict=True), strict=True)])
    return _table(["", *RATES.values()], [[label, *row] for label, row in zip(labels, rates, strict=True)])


def _differences(store: Store, evaluations: list[Evaluation]) -> str:
    pairs = list(pairwise(evaluations))
    found = [compare(*(store.read_table(evaluation.file).to_pylist() for evaluation in pair)) for pair in pairs]
    header = ["", *(f"{after.checkpoint} - {before.checkpoint}" for before, after in pairs)]
    return _table(header, [[label, *(_points(differences.get(name)) for differences in found)] for name, label in RATES.items()])


def _points(difference: dict[str, float] | None) -> str:
    if difference is None:
        return "-"
    if difference["low"] == difference["high"]:
        return f"{100 * difference['value']:+.0f}, all groups alike"
    return f"{100 * difference['value']:+.0f} [{100 * difference['low']:+.0f}, {100 * difference['high']:+.0f}]"


def _rate(rate: dict[str, Any] | None) -> str:
    if not rate or not rate["total"]:
        return "-"
    return f"{100 * rate['value']:.0f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)

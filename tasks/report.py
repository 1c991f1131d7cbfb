"""The report of a run: what was kept and why, what was trained, and how base, SFT and RL compare."""

import json
from itertools import pairwise
from typing import Any

from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext

from tasks.checkpoints import Checkpoint
from tasks.dataset import NOT_CALIBRATED, Dataset
from tasks.evaluate import Evaluation, compare
from tasks.progress import say
from tasks.select import funnel_markdown
from tasks.store import Store

RATES = {
    "format_adherence": "format without guidance",
    "verdict_accuracy": "verdict as ideal",
    "unsafe_compliance": "unsafe compliance (lower is better)",
    "over_refusal": "over-refusal (lower is better)",
    "policy_retrieval": "cited category matches",
    "not_graded": "no verdict of the judge",
}


def write_report(
    store: Store, manifest: dict[str, Any], dataset: Dataset, checkpoints: list[Checkpoint], evaluations: list[Evaluation]
) -> str:
    """Writes `runs/<id>/report.md` and `manifest.json`, shows the summary, returns the run's directory."""
    path = f"runs/{manifest['id']}"
    text = markdown(store, manifest, dataset, checkpoints, evaluations)
    store.replace(f"{path}/report.md", text.encode())
    store.replace(f"{path}/manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
    if FlowRunContext.get():
        create_markdown_artifact(text, key="report", description=f"Run {manifest['id']}")
    say("\n" + _comparison(evaluations) + "\n")
    for name, place in (
        ("dataset", dataset.path),
        *((c.kind, f"checkpoints/{c.id}/model") for c in checkpoints),
        ("report", f"{path}/report.md"),
    ):
        say(f"  {name:<10} {store.path(place)}")
    return store.path(path)


def markdown(store: Store, manifest: dict[str, Any], dataset: Dataset, checkpoints: list[Checkpoint], evaluations: list[Evaluation]) -> str:
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
    trained = "\n".join(f"- {item.kind}: `checkpoints/{item.id}`, weights {item.weights[:12]}" for item in checkpoints)
    return f"""{NOT_CALIBRATED}

# Run {manifest["id"]}

Policy {source["policy"]["id"]} ({source["policy"]["hash"][:12]}),
generator {source["generator"]["id"]} @ {source["generator"]["revision"]},
judge {source["judge"]["id"]} @ {source["judge"]["revision"]} with k = {source["judge"]["k"]}.

## Evaluation

Share of prompts with the 95 % Wilson interval; unguided answers, judged without their thoughts. The judge is told which kind of answer
the policy asks for. Text without any thought is judged as an answer; what holds a thought that was never closed is not judged.

{_comparison(evaluations)}

Differences in percentage points, paired by prompt, with the 95 % interval of a bootstrap over scenario groups:

{_differences(store, evaluations)}

Verdict as ideal, by category:

{by_category}

## Dataset {dataset.name}@{dataset.version}

{funnel_markdown(dataset.manifest["funnel"])}

A kept row costs {_cost(manifest)}.
{_agreement(manifest)}

## Checkpoints

{trained}

## Prompts that were not used

{quarantined}
"""


def _cost(manifest: dict[str, Any]) -> str:
    cost = manifest["cost"]
    seconds, tokens = cost["engine_seconds_per_kept_row"], cost["tokens_per_kept_row"]
    price = f", {cost['price_per_kept_row']:.3g} at the endpoints' prices" if cost["price_per_kept_row"] else ""
    return f"{seconds:.3g} engine seconds, {tokens:,.0f} drawn tokens{price}; what was spent on rows that were dropped is in it"


def _agreement(manifest: dict[str, Any]) -> str:
    agreed, runs = manifest["agreement"], manifest["provenance"]["judge"]["k"]
    if runs < 2 or not agreed["total"]:
        return ""
    return (
        f"On completions that are judged {runs} times in any case, all runs agree to keep or to drop: {_rate(agreed)} of {agreed['total']}."
    )


def _comparison(evaluations: list[Evaluation]) -> str:
    header = ["", *(evaluation.checkpoint for evaluation in evaluations)]
    return _table(header, [[label, *(_rate(e.metrics[name]) for e in evaluations)] for name, label in RATES.items()])


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

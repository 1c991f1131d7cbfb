"""The course of a training run as a picture: the measures of `metrics.jsonl` over its steps."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
PHASES = ("rollout_seconds", "judge_seconds", "train_seconds", "sync_seconds")


@dataclass(frozen=True)
class Panel:
    """Measures that share an axis, those of them that a run has."""

    title: str
    measures: tuple[str, ...]
    unit: str = ""


PANELS = (
    Panel("Loss", ("loss",)),
    Panel(
        "Development split",
        ("development_verdict_accuracy", "development_policy_retrieval", "development_format_adherence", "development_over_refusal"),
        "share of prompts",
    ),
    Panel("Reward, and what rewards nothing", ("reward", "held_out_reward", "rule_reward"), "0 to 1"),
    Panel("Accuracy", ("token_accuracy", "pair_accuracy"), "share"),
    Panel("Implicit rewards", ("chosen_reward", "rejected_reward"), "nats"),
    Panel("KL to the start", ("reference_kl",), "nats a token"),
    Panel("Entropy", ("entropy",), "nats a token"),
    Panel("Length", ("thought_tokens", "answer_tokens"), "tokens"),
    Panel("Refusals", ("refusals", "over_refusals"), "share of answers"),
    Panel("Judge's spread", ("judge_spread",), "standard deviation of the runs"),
    Panel("Groups", ("drawn_groups", "effective_groups"), "groups a step"),
    Panel("Speed", ("tokens_per_second",), "tokens/s"),
)


def plot(lines: Sequence[dict[str, Any]], title: str) -> bytes:
    """A PNG with a panel for each kind of measure that the lines have, and one for where the time went."""
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(name in line for line in lines for name in panel.measures)]
    timed = any(PHASES[0] in line for line in lines)
    shown = [*panels, *([None] if timed else [])]
    rows = [shown[start : start + COLUMNS] for start in range(0, len(shown), COLUMNS)]
    figure = Figure(figsize=(4.2 * COLUMNS, 2.7 * len(rows)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), COLUMNS, squeeze=False)
    for row, places in zip(rows, axes, strict=True):
        for panel, place in zip(row, places, strict=False):
            _draw(place, panel, lines) if panel else _draw_phases(place, lines)
        for place in places[len(row) :]:
            place.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    return stream.getvalue()


def _draw(place: "Axes", panel: Panel, lines: Sequence[dict[str, Any]]) -> None:
    for name in panel.measures:
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            place.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker="." if len(points) < 40 else "")
        banded = [line for line in lines if f"{name}_low" in line]
        low, high = ([line[f"{name}_{end}"] for line in banded] for end in ("low", "high"))
        place.fill_between([line["step"] for line in banded], low, high, alpha=0.2)
    _label(place, panel.title, panel.unit)


def _draw_phases(place: "Axes", lines: Sequence[dict[str, Any]]) -> None:
    """Seconds of each phase of a step, on top of each other; `other` is mostly the checkpoint of the step before."""
    steps = [line["step"] for line in lines]
    seconds = {name.split("_")[0]: [line.get(name, 0.0) for line in lines] for name in PHASES}
    if all("step_seconds" in line for line in lines):
        known = (sum(phases) for phases in zip(*seconds.values(), strict=True))
        seconds["other"] = [max(0.0, line["step_seconds"] - each) for line, each in zip(lines, known, strict=True)]
    place.stackplot(steps, *seconds.values(), labels=list(seconds))
    _label(place, "Time", "seconds a step")


def _label(place: "Axes", title: str, unit: str) -> None:
    place.set_title(title, fontsize="medium")
    place.set_xlabel("step")
    place.set_ylabel(unit)
    place.legend(fontsize="small")

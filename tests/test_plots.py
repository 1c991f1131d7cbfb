"""The pictures of a training: which panels it has, what is in them, and the band of an interval."""

from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.plots import plot

RL = {"loss": 0.1, "reference_kl": 0.01, "entropy": 1.5, "thought_tokens": 30, "answer_tokens": 50, "refusals": 0.4, "over_refusals": 0.1}
RL |= {"judge_spread": 0.1, "effective_groups": 3, "tokens_per_second": 90, "reward": 0.5, "reward_low": 0.4, "reward_high": 0.6}
RL |= {"held_out_reward": 0.4, "rollout_seconds": 5, "judge_seconds": 1, "train_seconds": 3, "sync_seconds": 1, "step_seconds": 11}
TITLES = {"Loss", "Reward, and what rewards nothing", "KL to the start", "Entropy", "Length", "Refusals", "Judge's spread", "Groups"}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn."""
    drawn, save = list[Figure](), Figure.savefig

    def kept(self: Figure, *arguments: Any, **more: Any) -> None:
        drawn.append(self)
        save(self, *arguments, **more)

    monkeypatch.setattr(Figure, "savefig", kept)
    return drawn


def panels(figure: Figure) -> dict[str, Axes]:
    return {place.get_title(): place for place in figure.axes if place.get_title()}


def test_rl_has_a_panel_for_each_kind_of_measure_and_the_reward_its_interval(figures: list[Figure]) -> None:
    picture = plot([RL | {"step": step} for step in range(4)], "rl-1")
    assert picture.startswith(b"\x89PNG")
    found = panels(figures[0])
    assert found.keys() == TITLES | {"Speed", "Time"}
    assert all(place.get_xlabel() == "step" for place in found.values())
    reward = found["Reward, and what rewards nothing"]
    assert {line.get_label() for line in reward.get_lines()} == {"reward", "held out reward"} and reward.get_ylabel() == "0 to 1"
    band = reward.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.4, 0.6)
    labels = [text.get_text() for text in found["Time"].get_legend().get_texts()]
    assert labels == ["rollout", "judge", "train", "sync", "other"]
    assert max(part.get_paths()[0].vertices[:, 1].max() for part in found["Time"].collections) == 11, "all of a step is there"


def test_sft_has_its_loss_and_the_looks_at_the_development_split(figures: list[Figure]) -> None:
    lines = [{"step": step, "loss": 2.0 - step, "tokens_per_second": 80} for step in range(3)]
    lines[2] |= {"development_policy_retrieval": 0.3, "development_over_refusal": 0.1}
    plot(lines, "sft-1")
    found = panels(figures[0])
    assert found.keys() == {"Loss", "Development split", "Speed"}
    assert [list(line.get_xdata()) for line in found["Development split"].get_lines()] == [[2], [2]]

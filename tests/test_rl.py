"""RL without engines: the order of prompts, what a step's rows say, and the alarms."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.chat import Turn, chat_of
from cluster.engine import Completion, Sampling
from cluster.models import Model, resolve_model
from tasks.collect import NO_SPREAD, NOISE, Collected, PromptOrder, Source, _row, _weigh, collect, effective_groups, trained
from tasks.judge import JudgeConfig
from tasks.policy import load_policy, render
from tasks.prompts import CELLS, Message, Prompt
from tasks.rewards import FLOOR
from tasks.rl import RlJob, Rollouts, _steered
from tasks.rl_config import RlConfig
from tasks.rl_metrics import WINDOW, alarms, describe
from tasks.rollout import DrawShard, blind_shards, draw, judge_blind
from tasks.training_log import TrainingLog, read_lines

PROMPTS = [
    Prompt(
        id=f"{cell}-{number}",
        messages=(Message(role="user", content="Hello."),),
        category="violence",
        cell=cell,
        group=f"g{number}",
        ideal_verdict="refuse" if cell == "violation" else "comply",
        ideal_clauses=("VI1",),
    )
    for cell in CELLS
    for number in range(3)
]


def row(group: int, reward: float | None, **values: Any) -> dict[str, Any]:
    """A judged rollout of ten tokens, four of them the thought's."""
    return {
        "group": group,
        "cell": "benign",
        "ideal_verdict": "comply",
        "token_ids": list(range(10)),
        "thought_tokens": 4,
        "answer_kind": "answer",
        "rewards": [] if reward is None else [reward],
        "reward": reward,
        "rule_reward": 0.5,
        "held_out_reward": None,
        "drop_reason": None,
    } | values


# Prompts


def test_groups_take_all_cells_in_turn_and_every_prompt_before_any_comes_again() -> None:
    order = PromptOrder(PROMPTS, {}, seed=0)
    first = [order.at(number) for number in range(12)]
    assert len({prompt.id for prompt in first}) == 12
    assert all({prompt.cell for prompt in first[start : start + 4]} == set(CELLS) for start in (0, 4, 8))
    second = [order.at(number).id for number in range(12, 24)]
    assert sorted(second) == sorted(prompt.id for prompt in first)
    assert [PromptOrder(PROMPTS, {}, seed=0).at(number) for number in (17, 3)] == [order.at(17), order.at(3)], "any group, at any time"
    assert [PromptOrder(PROMPTS, {}, seed=1).at(number) for number in range(12)] != first


def test_a_mix_weighs_the_cells() -> None:
    order = PromptOrder(PROMPTS, {"violation": 2, "benign": 1, "borderline": 1}, seed=0)
    for length in (4, 40):
        assert Counter(order.at(number).cell for number in range(length)) == {
            "violation": length // 2,
            "benign": length // 4,
            "borderline": length // 4,
        }
    with pytest.raises(ValueError, match="mix"):
        RlConfig.model_validate({"mix": {"harmful": 1}})


# Rollouts


CHAT = chat_of(resolve_model("default").path)
TEXTS = [
    ("<think>\nSo.\n</think>\nGood.", "stop"),
    ("<think>\nSo.\n</think>\nGood", "length"),
    ("<think>\nSo", "stop"),
    ("Good.", "stop"),
]


@dataclass
class Scripted:
    """Draws the texts it is told to, in turn, and counts what it is asked to judge."""

    texts: list[tuple[str, str]]
    judged: list[Sequence[Turn]] = field(default_factory=list)

    async def complete(self, turns: Sequence[Turn], sampling: Sampling) -> Completion:
        if sampling.json_schema:
            self.judged.append(turns)
            return Completion("[5, 5, 5]", "stop", 1, 1, 0)
        assert (sampling.temperature, sampling.grammar) == (1.0, None), "nothing but the temperature shapes what is drawn"
        text, reason = self.texts.pop(0)
        ids = CHAT.text(text)
        return Completion(text, reason, 1, len(ids), 0, token_ids=ids, logprobs=[-0.5] * len(ids), prompt_ids=CHAT.prompt(turns))


def test_a_rollout_that_was_cut_or_whose_thought_is_not_closed_gets_the_floor_and_no_judge_sees_it() -> None:
    engine, prompt = Scripted(list(TEXTS)), PROMPTS[-1]
    drawn = asyncio.run(draw(engine, DrawShard(str(CHAT.path), (prompt,), 4, 64, 1.0, 0)))
    assert [one.earns for one in drawn] == [True, False, False, False]
    spec, config = render(load_policy("specs/policies/base"), "violence"), JudgeConfig(k=2)
    shards = blind_shards([one for one in drawn if one.earns], {prompt.id: prompt}, {"violence": spec}, config)
    verdicts = [asyncio.run(judge_blind(engine, shard)) for shard in shards]
    assert len(engine.judged) == 2 and "So." not in str(engine.judged)
    fleet: Any = None
    source = Source("job", "", RlConfig(), (prompt,), {"violence": spec}, fleet, fleet, Model("", "judge", "0"), config)
    rows = [_row(source, 0, 0, 0, prompt, one, verdicts[0][0] if one.earns else [], []) for one in drawn]
    assert [row["reward"] for row in rows] == [1.0, FLOOR, FLOOR, FLOOR]
    assert [row["malformed"] for row in rows] == [None, None, "unterminated_thought", "no_thought"]
    assert [row["token_ids"] for row in rows] == [CHAT.text(text) for text, _ in TEXTS], "what is learnt are the tokens that were drawn"


# Groups of a step


def collected(monkeypatch: pytest.MonkeyPatch, teaching: set[int], **changes: Any) -> list[dict[str, Any]]:
    """The rows of a step of three groups, where only groups with some numbers have answers that earn different rewards."""
    config = RlConfig.model_validate({"prompts_per_step": 3, "rollouts_per_prompt": 2, "advantage": "dr_grpo", "noise": "keep"} | changes)

    def answer(source: Source, step: int, version: int, groups: dict[int, Prompt], found: Collected) -> None:
        for number, prompt in groups.items():
            found.rows += [row(number, float(number in teaching and sample), prompt_id=prompt.id) for sample in range(2)]

    monkeypatch.setattr("tasks.collect._answer", answer)
    fleet: Any = None
    source = Source("job", "", config, tuple(PROMPTS), {}, fleet, None, Model("", "judge", "0"), JudgeConfig())
    return collect(source, step=4, version=4, first_group=12).rows


@pytest.mark.parametrize(
    ("teaching", "refills", "numbers"),
    [
        ({12, 13, 14}, 5, [12, 13, 14]),  # nothing is missing
        ({12, 15, 17}, 5, [12, 13, 14, 15, 16, 17]),  # two are missing, and then one
        ({12, 15, 17}, 1, [12, 13, 14, 15, 16]),  # once is not enough
        (set(), 2, list(range(12, 21))),
        (set(), 0, [12, 13, 14]),
    ],
)
def test_groups_that_teach_nothing_are_replaced_and_stay_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, teaching: set[int], refills: int, numbers: list[int]
) -> None:
    rows, order = collected(monkeypatch, teaching, refills=refills), PromptOrder(PROMPTS, {}, 0)
    assert [found["group"] for found in rows] == [number for number in numbers for _ in range(2)]
    assert all(found["prompt_id"] == order.at(found["group"]).id for found in rows), "further prompts, in their order"
    assert {found["group"]: found["drop_reason"] for found in rows} == {
        number: None if number in teaching else NO_SPREAD for number in numbers
    }
    assert [found["advantage"] for found in rows] == [
        value for number in numbers for value in ((-0.5, 0.5) if number in teaching else (0.0, 0.0))
    ]


def test_no_more_is_said_of_the_start_when_its_rollouts_are_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tasks.rl.agreed", lambda value: value)
    engine: Any = SimpleNamespace(rank=0)
    job = RlJob(str(tmp_path), "rl-1", "", "", "", RlConfig(), None, 1e-4)
    assert Rollouts(job, engine, 0).forward_kl() == {}


# Metrics


def test_what_is_known_of_earlier_steps_outlives_a_kill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        TrainingLog(path, 1)
    assert read_lines(path) == [{"step": 0}, {"step": 1}]
    assert TrainingLog(path, 1).lines == read_lines(path) == [{"step": 0}]


def test_a_step_trains_on_the_groups_that_teach_something_or_for_the_kl_on_all() -> None:
    rows = [row(0, 0.5, drop_reason="no_spread"), row(1, 0.2), row(1, 0.8)]
    assert effective_groups(rows) == 1 and trained(rows) == rows[1:]
    assert trained(rows[:1]) == rows[:1]


def test_metrics_of_a_step_say_what_was_rewarded_refused_and_drawn() -> None:
    rows = [
        row(0, 1.0, rewards=[1.0, 1.0]),
        row(0, 0.0, rewards=[0.0], answer_kind=None, thought_tokens=0),
        row(1, 0.5, rewards=[0.25, 0.75], answer_kind="refusal"),
        row(1, None, answer_kind="refusal", cell="violation", ideal_verdict="refuse"),
        row(2, 0.5, drop_reason=NOISE, held_out_reward=0.25),
    ]
    found = describe(rows)
    assert found["reward"] == pytest.approx(0.5) and found["reward_low"] <= 0.5 <= found["reward_high"]
    assert found["judged_share"] == 0.8 and found["refusals"] == 0.5 and found["over_refusals"] == pytest.approx(1 / 3)
    assert (found["thought_tokens"], found["answer_tokens"]) == (4, 6) and found["rollout_tokens"] == 50
    assert found["judge_spread"] == pytest.approx((0.0 + 0.25) / 2) and found["held_out_reward"] == 0.25
    assert (found["drawn_groups"], found["effective_groups"], found["noisy_groups"], found["trained_rollouts"]) == (3, 2, 1, 4)
    assert "over_refusals" not in describe(rows[3:4]), "what no row tells is left out"


def test_groups_that_teach_nothing_say_why_and_get_no_advantage() -> None:
    runs = {0: [[0.5, 0.5], [0.5, 0.5]], 1: [[0.4, 0.6], [0.5, 0.7]], 2: [[0.0, 0.0], [1.0, 1.0]]}
    rows = [row(group, sum(given) / 2, rewards=given) for group, answers in runs.items() for given in answers]
    _weigh(rows, RlConfig(noise="drop", advantage="dr_grpo"))
    assert [(found["drop_reason"], found["advantage"]) for found in rows] == [
        (NO_SPREAD, 0), (NO_SPREAD, 0), (None, pytest.approx(-0.05)), (None, pytest.approx(0.05)), (None, -0.5), (None, 0.5)
    ]  # fmt: skip
    rows[2] |= {"rewards": [0.1, 0.9], "reward": 0.5}
    _weigh(rows, RlConfig(noise="drop", advantage="dr_grpo"))
    assert [found["drop_reason"] for found in rows[2:4]] == [NOISE, NOISE] and rows[3]["advantage"] == 0


def test_the_weight_of_the_kl_follows_its_target_slowly_and_only_if_there_is_one() -> None:
    assert _steered(0.1, 5.0, None) == 0.1
    assert _steered(0.1, 5.0, 0.5) == pytest.approx(0.102) and _steered(0.1, 0.0, 0.5) == pytest.approx(0.098)
    with pytest.raises(ValueError, match="kl_target"):
        RlConfig(kl=0, kl_target=0.1)


# Alarms


def history(**courses: tuple[float, float]) -> list[dict[str, Any]]:
    """Lines of three windows, in which measures move from one value to another, and the others stay as a healthy run's are."""
    healthy = {"reward": (0.3, 0.6), "rule_reward": (0.3, 0.5), "thought_tokens": (40, 42), "answer_tokens": (60, 50)}
    healthy |= {"judged_share": (0.5, 0.9), "may_be_helped": (16, 16), "over_refusals": (0.1, 0.25)}
    healthy |= {"reference_kl": (0.0, 0.05), "entropy": (2.0, 1.5), "effective_groups": (6, 4)}
    steps = 3 * WINDOW
    return [
        {"step": step} | {name: start + (end - start) * step / (steps - 1) for name, (start, end) in (healthy | courses).items()}
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("name", "courses"),
    [
        ("short_thoughts", {"thought_tokens": (40.0, 5.0)}),
        ("short_answers", {"answer_tokens": (60.0, 5.0)}),
        ("over_refusal", {"over_refusals": (0.1, 0.9)}),
        ("no_thoughts", {"judged_share": (0.9, 0.1)}),
        ("over_optimisation", {"rule_reward": (0.4, 0.3)}),
        ("over_optimisation", {"held_out_reward": (0.4, 0.3)}),
        ("drift", {"reference_kl": (0.0, 3.0)}),
        ("entropy_collapse", {"entropy": (2.0, 0.01)}),
        ("no_signal", {"effective_groups": (-0.0, 0.0)}),
    ],
)
def test_each_way_to_go_wrong_has_an_alarm_of_its_own(name: str, courses: dict[str, tuple[float, float]]) -> None:
    found = alarms(history(**courses))
    assert [alarm.name for alarm in found] == [name] and found[0].step == 3 * WINDOW - 1 and "->" in found[0].text


def test_a_healthy_run_and_a_short_one_raise_no_alarm() -> None:
    assert alarms(history()) == []
    assert alarms(history(thought_tokens=(40.0, 0.0))[: 2 * WINDOW - 1]) == []
    assert alarms(history(rule_reward=(1.0, 0.85))) == [], "rules that ask for no more than a sentence can only be disappointed"
    assert alarms(history(over_refusals=(0.0, 0.6), may_be_helped=(1, 1))) == [], "four answers say nothing"
    assert alarms(history(rule_reward=(0.4, 0.3), held_out_reward=(0.4, 0.5))) == [], "a judge that is held out is asked before the rules"

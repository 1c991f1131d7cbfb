"""Preference pairs and spare rows: which completions they take, and the views of a dataset that hold them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from tiny_run import make_root, write_run

from cluster.chat import Chat
from flows.inspect import problems
from tasks.batch import RowOrder
from tasks.complete import STAGE
from tasks.ledger import Ledger
from tasks.preferences import pairs
from tasks.select import Candidates, PairConfig, SelectConfig, select, spare
from tasks.stage_config import SftConfig
from tasks.training_rows import preference_rows, training_rows


def candidates(scores: list[list[list[int]]], reasons: dict[tuple[int, int], str] | None = None) -> Candidates:
    """Completions of one category: for each prompt, for each sample the scores of its judge runs."""
    flat = [(prompt, sample, runs) for prompt, samples in enumerate(scores) for sample, runs in enumerate(samples)]
    count = len(flat)
    found = Candidates(
        categories=["pets"],
        category=np.zeros(count, np.uint8),
        verdict=np.ones(count, np.uint8),
        prompt=np.array([prompt for prompt, _, _ in flat], np.uint32),
        sample=np.array([sample for _, sample, _ in flat], np.uint16),
        scores=np.array([runs for _, _, runs in flat], np.int8),
        reason=np.zeros(count, np.uint8),
        reasons=[None],
    )
    for (prompt, sample), reason in (reasons or {}).items():
        found.drop(next(index for index, (p, s, _) in enumerate(flat) if (p, s) == (prompt, sample)), reason)
    return found


def named(found: Candidates, config: PairConfig) -> list[tuple[int, int, int]]:
    """(prompt, chosen sample, rejected sample)."""
    chosen, rejected = pairs(found, config)
    assert (found.prompt[chosen] == found.prompt[rejected]).all()
    return list(zip(found.prompt[chosen].tolist(), found.sample[chosen].tolist(), found.sample[rejected].tolist(), strict=True))


SCORES = [
    [[5, 5], [2, 2], [4, 5], [1, 0]],  # 0 against 3, whose second run was not needed; then 2 against 1
    [[5, 4], [5, 5]],  # too close
    [[3, 3], [1, 1]],  # the better one is below the threshold
    [[5, 5], [5, -1]],  # a verdict is missing
    [[5, 5]],
    [[0, 0], [4, 4], [2, 2]],  # the first was gated and never judged
]


def test_the_best_is_chosen_over_the_worst_if_it_passed_and_is_better_by_the_margin() -> None:
    found = candidates(SCORES, {(5, 0): "truncated"})
    select(found, SelectConfig(threshold=4))
    assert named(found, PairConfig(margin=1)) == [(0, 0, 3), (5, 1, 2)]
    assert named(found, PairConfig(margin=1, per_prompt=2)) == [(0, 0, 3), (0, 2, 1), (5, 1, 2)]
    assert named(found, PairConfig(margin=3)) == [(0, 0, 3)]
    assert named(found, PairConfig(margin=0.5)) == [(0, 0, 3), (1, 1, 0), (5, 1, 2)]
    assert named(found, PairConfig(per_prompt=0)) == []


def test_what_did_not_pass_is_never_chosen_and_takes_no_place_of_what_did() -> None:
    found = candidates([[[5, 5, 3], [4, 4, 4], [1, 0, 0]], [[5, 5, 3], [5, 5, 3]]])
    select(found, SelectConfig(threshold=4))
    assert named(found, PairConfig()) == [(0, 1, 2)]


def test_spare_rows_passed_and_were_more_than_was_wanted() -> None:
    found = candidates([[[4], [5], [4], [2]], [[4], [4]]])
    select(found, SelectConfig(threshold=4, max_per_category=1))
    assert found.kept.tolist() == [False, True, False, False, False, False]
    assert spare(found, 3).tolist() == [True, False, True, False, True, True]
    assert spare(found, 1).tolist() == [True, False, False, False, True, False]
    assert not spare(found, 0).any()


def test_rso_accepts_as_its_algorithm_does() -> None:
    """Frequencies of the pairs of 4,000 prompts beside a simulation of the published algorithm."""
    rewards, beta, prompts = (5, 4, 3), 0.8, 4000
    found = candidates([[[reward] for reward in rewards]] * prompts)
    ours = named(found, PairConfig(sampling="rso", rso_beta=beta))
    assert ours == named(found, PairConfig(sampling="rso", rso_beta=beta)), "the same completions give the same pairs"
    assert len({prompt for prompt, _, _ in ours}) == prompts, "two of three are always accepted, and differ"
    chance, theirs = np.random.default_rng(0), []
    for _ in range(prompts):
        left, accepted = list(chance.permutation(3)), list[int]()
        while len(accepted) < 2:
            best = max(rewards[one] for one in left)
            taken = [one for one in left if chance.random() < np.exp((rewards[one] - best) / beta)]
            accepted += taken
            left = [one for one in left if one not in taken]
        theirs.append(tuple(sorted(accepted[:2])))
    for pair in ((0, 1), (0, 2), (1, 2)):
        expected = theirs.count(pair) / prompts
        assert [(best, worst) for _, best, worst in ours].count(pair) / prompts == pytest.approx(expected, abs=0.03)


def test_rows_of_a_step_are_alike_when_lengths_are_grouped() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 600).tolist()

    def spread(grouped: bool) -> float:
        order = RowOrder(lengths, 4, seed=1, grouped=grouped)
        steps = [order.at(step)[1] for step in range(150)]
        assert sorted(index for step in steps for index in step) == list(range(600))
        return float(np.mean([np.ptp([lengths[index] for index in step]) for step in steps]))

    assert spread(True) < spread(False) / 20
    means = [np.mean([lengths[index] for index in RowOrder(lengths, 4, seed=1, grouped=True).at(step)[1]]) for step in range(50)]
    assert np.corrcoef(means, range(50))[0, 1] < 0.5, "steps are in no order of length"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny run with eight samples of each prompt, judged twice."""
    file = write_run(tmp_path_factory.mktemp("preferences"))
    content = yaml.safe_load(file.read_text())
    content["generate"]["n"], content["judge"]["k"] = 8, 2
    content["select"] = {"threshold": 2, "min_categories": 1, "pairs": {"per_prompt": 2}}
    file.write_text(yaml.safe_dump(content))
    return make_root(file)


def view(run: Any, name: str) -> list[dict[str, Any]]:
    return [row for path in run.dataset.files(name) for row in run.store.read_table(path).to_pylist()]


def test_the_views_of_a_dataset_add_up(dataset: Any) -> None:
    data, more, preferred, audit = (view(dataset, name) for name in ("data", "spare", "preferences", "audit"))
    manifest = dataset.dataset.manifest
    assert (len(data), len(more), len(preferred)) == (manifest["rows"], manifest["spare"], manifest["preferences"])
    assert len(data) > 4 and len(more) > 4 and len(preferred) > 4
    by_key = {row["key"]: row for row in audit}
    texts = {}
    for shard in Ledger(dataset.store, STAGE).shards():
        rows = dataset.store.read_table(shard.path, ["key", "thought", "answer", "messages"]).to_pylist()
        texts |= {row["key"]: row for row in rows}
    for row in preferred:
        for side in ("chosen", "rejected"):
            key = row[f"{side}_key"]
            assert (row[f"{side}_thought"], row[f"{side}_answer"]) == (texts[key]["thought"], texts[key]["answer"])
            assert by_key[key]["prompt_id"] == row["prompt_id"] and row["messages"] == texts[key]["messages"]
            assert row[f"{side}_score"] == pytest.approx(np.mean(by_key[key]["scores"]))
        assert by_key[row["chosen_key"]]["score"] >= 2 and row["chosen_score"] - row["rejected_score"] >= 1
    reasons = {row["key"]: row["drop_reason"] for row in audit}
    assert sum(reason == "not_best_of_n" for reason in reasons.values()) >= len(more)
    assert problems(str(Path(dataset.store.root) / dataset.dataset.path))[0] == []


def test_preference_rows_are_both_completions_behind_the_same_prompt(dataset: Any, tiny_model: str) -> None:
    chat = Chat(tiny_model)
    rows = preference_rows(dataset.store, dataset.dataset.files("preferences"), chat)
    for row, told in zip(rows.to_pylist(), view(dataset, "preferences"), strict=True):
        prompt = row["prompt_length"]
        assert row["chosen_ids"][:prompt] == row["rejected_ids"][:prompt]
        for side in ("chosen", "rejected"):
            text = chat.decode(row[f"{side}_ids"][prompt:])
            assert told[f"{side}_answer"] in text and told[f"{side}_thought"] in text
    files = dataset.dataset.files("data") + dataset.dataset.files("spare")
    table = training_rows(dataset.store, files, [], chat, SftConfig())
    assert table.num_rows == dataset.dataset.manifest["rows"] + dataset.dataset.manifest["spare"]


def test_hugging_face_datasets_reads_the_views_by_name(dataset: Any, tmp_path: Path) -> None:
    from datasets import load_dataset

    for name in ("default", "spare", "preferences"):
        rows = load_dataset(dataset.store.path(dataset.dataset.path), name, split="train", cache_dir=str(tmp_path))
        assert rows.num_rows == dataset.dataset.manifest["rows" if name == "default" else name]
    assert pa.types.is_string(pa.schema(rows.features.arrow_schema).field("chosen_thought").type)

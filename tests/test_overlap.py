"""Rows that resemble others: near-duplicates, overlap with evaluation prompts, the command that shows them; real data sets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prompt_sources import LABELS, TEXT, all_prompts, loaded, only_reason, write_csv, write_jsonl, write_run_file
from typer.testing import CliRunner

from cluster.errors import UserError
from flows.cli import app
from tasks import duplicates
from tasks.duplicates import Rows, band_width, pairs_between, pairs_within, shingles

FOX = "the quick brown fox jumps over the lazy dog while the old farmer counts his seven sleepy sheep behind the red barn at dusk"
HEN = "please explain in plain words how compound interest works on a savings account that pays two percent each year"


@pytest.mark.parametrize(("config", "kept"), [("report", 3), ("drop", 2), ("off", 3)])
def test_near_duplicates_are_found_and_the_first_stays(tmp_path: Path, config: str, kept: int):
    rows = [{"q": FOX}, {"q": HEN}, {"q": FOX.upper().replace("DUSK", "dawn!")}]
    prompts = loaded(tmp_path, TEXT | {"path": write_jsonl(tmp_path / "x.jsonl", rows)}, overlap={"duplicates": config})
    assert prompts.counts == {"prompts": kept, "capability": 0, "quarantined": 3 - kept}
    assert [prompt.messages[0].content for prompt in all_prompts(prompts)][:2] == [FOX, HEN]
    found = prompts.manifest["overlap"]
    assert found["near_duplicates"] == (config != "off") and found["dropped"] == (config == "drop")
    if config != "off":
        (example,) = found["examples"]
        assert example["resembles"] == all_prompts(prompts)[0].id and example["line"] == 3 and 0.8 < example["similarity"] < 1
        (file,) = [file["path"] for file in prompts.manifest["files"] if file["path"].startswith("overlap/")]
        assert prompts.store.read_table(f"{prompts.path}/{file}").to_pylist() == [example]
    if config == "drop":
        assert "x.jsonl:3: near-duplicate: 0.9" in only_reason(prompts) and "x.jsonl:1)" in only_reason(prompts)


@pytest.mark.parametrize(("config", "kept"), [("report", 3), ("drop", 2)])
def test_training_rows_like_evaluation_prompts(tmp_path: Path, config: str, kept: int):
    """Also those that come before the evaluation prompt, whose similar evaluation prompts stay."""
    rows = [{"q": FOX + " again", "s": "sft"}, {"q": HEN, "s": "sft"}, {"q": FOX, "s": "eval"}]
    source = {"path": write_jsonl(tmp_path / "x.jsonl", rows), "columns": {"text": "q", "split": "s"}, "constants": LABELS}
    prompts = loaded(tmp_path, source, overlap={"contamination": config})
    assert (prompts.counts["prompts"], prompts.size("eval")) == (kept, 1)
    assert prompts.manifest["overlap"]["contaminated"] == 1 and prompts.manifest["overlap"]["near_duplicates"] == 0
    if config == "drop":
        (evaluated,) = prompts.prompts("eval")
        assert f"x.jsonl:1: contamination: 0.96 like the evaluation prompt {evaluated.id!r}" in only_reason(prompts)


def test_rows_like_an_external_benchmark_are_dropped(tmp_path: Path):
    rows = [{"q": FOX}, {"q": HEN}]
    write_csv(tmp_path / "bench.csv", [{"question": HEN + " or so"}, {"question": ""}, {"question": "unrelated words entirely"}])
    benchmark = {"path": str(tmp_path / "bench.csv"), "columns": {"text": "question"}}
    source = TEXT | {"path": write_jsonl(tmp_path / "x.jsonl", rows)}
    prompts = loaded(tmp_path, source, overlap={"contamination": "drop", "benchmarks": benchmark})
    assert "x.jsonl:2: contamination: 0.89 like the evaluation prompt 'bench-" in only_reason(prompts) and "bench.csv:2)" in only_reason(
        prompts
    )
    (described,) = prompts.manifest["overlap"]["benchmarks"]
    assert (described["rows"], described["unusable"]) == (3, 1) and "bench.csv:3: text: nothing" in described["first_reason"]
    with pytest.raises(UserError, match=r"overlap.benchmarks: .*not one usable prompt"):
        loaded(
            tmp_path, source, overlap={"benchmarks": {"path": write_jsonl(tmp_path / "none.jsonl", [{"q": 5}]), "columns": {"text": "q"}}}
        )


def _rows(texts: list[str]) -> Rows:
    rows = Rows(3)
    rows.add([{"messages": [{"content": text}]} for text in texts])
    return rows


def test_pairs_are_those_of_comparing_all():
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(300, 40).astype(str)) for _ in range(300)]
    texts += [text.replace(text.split()[place], "changed") for place in (0, 20) for text in texts[:100]]
    texts += [texts[0]] * 50
    rows, grams = _rows(texts), [shingles([{"content": text}], 3) for text in texts]
    alike = {
        (left, right)
        for right in range(len(texts))
        for left in range(right)
        if len(grams[left] & grams[right]) / len(grams[left] | grams[right]) >= 0.8
    }
    found = {pair[:2] for pair in pairs_within(rows, 0.8)}
    assert found <= alike and {right for _, right in found} >= {right for left, right in alike if left < 100}
    some, references = np.arange(300, len(texts)), np.arange(300)
    assert {pair[:2] for pair in pairs_between(rows, some, rows, references, 0.8)} == {
        (right, left) for left, right in alike if left < 300 <= right
    }


def test_copies_are_found_in_a_crowd_without_comparing_everything_with_everything(monkeypatch: pytest.MonkeyPatch):
    template = " ".join(f"word{number}" for number in range(60))
    texts = [f"{template} ending {number}" for number in range(600)]
    compared: list[int] = []
    estimates = duplicates._estimates

    def counted(left: Any, here: Any, right: Any, there: Any) -> Any:
        compared.append(len(here))
        return estimates(left, here, right, there)

    monkeypatch.setattr(duplicates, "_estimates", counted)
    rows, some = _rows(texts + texts[400:]), np.arange(600, 800)
    found = pairs_between(rows, some, rows, np.arange(600), 0.8)
    copies = {(row, other) for row, other, similarity in found if similarity == 1.0}
    assert copies == {(600 + number, 400 + number) for number in range(200)}
    assert sum(compared) < 200 * duplicates.NEIGHBOURS * 128 // band_width(0.8)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_hardly_miss_a_pair_at_the_threshold(threshold: float):
    width = band_width(threshold)
    assert width >= 1 and (1 - threshold**width) ** (128 // width) <= 0.006


def test_shingles_of_short_texts_and_of_scripts_without_spaces():
    assert shingles([{"content": "Stop!"}], 3) == {"stop"}
    assert shingles([{"content": "?!"}], 3) == {"?!"}
    assert shingles([{"content": "天気はどう"}], 3) == {"天 気 は", "気 は ど", "は ど う"}
    assert not pairs_within(Rows(3), 0.8)


def test_the_command_shows_sources_splits_reasons_and_overlap(tmp_path: Path):
    rows = [{"q": FOX, "s": "sft"}, {"q": FOX + " again", "s": "sft"}, {"q": FOX + " now", "s": "eval"}, {"q": HEN, "s": "train"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    prompts = {"path": "x.jsonl", "columns": {"text": "q", "split": "s"}, "constants": LABELS}
    file = write_run_file(tmp_path, {"prompts": prompts, "overlap": {"duplicates": "drop"}})
    shown = CliRunner().invoke(app, ["prompts", "check", file, "--root", str(tmp_path / "root")])
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    assert f"{tmp_path}/x.jsonl 4 2 0 2" in lines and "harassment 1 0 0 1" in lines
    assert "1 near-duplicates, 2 rows like evaluation prompts, 1 dropped" in lines
    assert any(line.startswith("split 1 ") and "x.jsonl:4" in line for line in lines)
    assert any(line.startswith("near-duplicate 1 ") for line in lines)
    assert any(line.startswith("contamination: ") and "x.jsonl:3)" in line for line in lines)


def test_ailuminate_and_advbench(tmp_path: Path, test_data: Path):
    """Three of the twelve hazards are mapped to categories; rows of the others are quarantined, each with its reason."""
    source = {
        "path": str(test_data / "ailuminate-demo" / "airr_official_1.0_demo_en_us_prompt_set_release.csv"),
        "columns": {"id": "release_prompt_id", "text": "prompt_text", "category": "hazard", "ideal_clauses": "hazard"},
        "constants": {"cell": "violation", "ideal_verdict": "refuse"},
        "values": {
            "category": {"dfm": "harassment", "hte": "harassment", "vcr": "violence"},
            "ideal_clauses": {"dfm": "HA11", "hte": "HA11", "vcr": "VI10"},
        },
    }
    benchmark = {"path": str(test_data / "advbench"), "columns": {"text": "goal"}}
    prompts = loaded(tmp_path, source, overlap={"duplicates": "drop", "contamination": "drop", "benchmarks": benchmark})
    assert sum(prompts.counts.values()) == 1100 and prompts.manifest["overlap"]["benchmarks"][0]["unusable"] == 0
    assert prompts.counts["prompts"] + prompts.manifest["overlap"]["dropped"] == 300
    assert {part.category for part in prompts.parts} == {"harassment", "violence"}


def test_gsm8k_as_benchmark_of_itself_and_moderation_release(tmp_path: Path, test_data: Path):
    train = {"path": str(test_data / "gsm8k" / "train_sample_1500.jsonl"), "columns": {"text": "question"}}
    flagged = {
        "path": str(test_data / "moderation-release" / "samples-1680.jsonl.gz"),
        "columns": {"text": "prompt", "ideal_verdict": "HR"},
        "constants": LABELS | {"ideal_clauses": "HA11"},
        "values": {"ideal_verdict": {"0": "comply", "1": "refuse"}},
    }
    prompts = loaded(tmp_path, flagged, train | {"constants": LABELS}, overlap={"contamination": "drop", "benchmarks": train})
    flagged_rows, train_rows = prompts.manifest["sources"]
    assert (flagged_rows["rows"], train_rows["rows"]) == (1680, 1500)
    assert flagged_rows["prompts"] and (train_rows["prompts"], train_rows["quarantined"]) == (0, 1500)

"""DPO on a real worker group: the reference is that of the starting weights, the pairs are learnt, ranks change nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.errors import UserError
from tasks.dpo import REFERENCE, SIDES, Dpo
from tasks.offline import train_offline
from tasks.stage_config import DpoConfig
from tasks.tables import PREFERENCE_ROWS

pytestmark = pytest.mark.training
PAIRS, STEPS = 8, 12
SCHEMA = pa.schema([PREFERENCE_ROWS.field(name) for name in Dpo.columns])


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of random rows of unequal length behind a common prompt."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 500, (PAIRS, 2, 20), generator=generator).tolist()
    columns: dict[str, Any] = {"prompt_length": [3] * PAIRS}
    for number, side in enumerate(SIDES):
        columns[f"{side}_ids"] = [[*pair[0][:3], *pair[number][3 : 8 + index + number]] for index, pair in enumerate(ids)]
    path = tmp_path_factory.mktemp("pairs") / "rows.parquet"
    pq.write_table(pa.table(columns, schema=SCHEMA), path)
    return path


def config(ranks: int, **changes: Any) -> DpoConfig:
    training = {"zero_stage": 2, "learning_rate": 3e-4, "micro_batch_tokens": 90, "schedule": "constant"}
    values = {"epochs": STEPS // 2, "rows_per_step": 4, "ranks": ranks, "cpus_per_rank": 0.5, "training": training, "save_every_steps": 4}
    return DpoConfig.model_validate(values | changes)


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def learnt(local_ray: None, rows_file: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have learnt."""
    output = tmp_path_factory.mktemp("dpo") / "two"
    train_offline(Dpo, str(rows_file), str(toy), str(output), config(2))
    return output


@pytest.mark.slow
def test_pairs_are_learnt_from_where_the_model_started(learnt: Path, rows_file: Path, toy: Path) -> None:
    from transformers import AutoModelForCausalLM

    lines = lines_of(learnt)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert lines[0]["loss"] == pytest.approx(math.log(2) + 0.2 * lines[0]["chosen_nll"], rel=1e-5), "nothing is learnt yet"
    assert lines[0]["weight"] == 4, "a pair counts once"
    assert lines[-1]["pair_accuracy"] == 1 and lines[-1]["chosen_reward"] > 0 > lines[-1]["rejected_reward"]

    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)
    rows, reference = pq.read_table(rows_file).to_pylist(), pq.read_table(learnt.parent / ".training" / "two" / REFERENCE).to_pylist()
    for row, found in zip(rows, reference, strict=True):
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row[f"{side}_ids"]])
            with torch.no_grad():
                logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert found[f"{side}_logp"] == pytest.approx(float(logp[row["prompt_length"] - 1 :].sum()), abs=1e-3)


@pytest.mark.soak
def test_one_rank_learns_the_same_from_pairs_as_two(learnt: Path, rows_file: Path, toy: Path, tmp_path: Path) -> None:
    train_offline(Dpo, str(rows_file), str(toy), str(tmp_path / "one"), config(1))
    one, two = lines_of(tmp_path / "one"), lines_of(learnt)
    for name in ("loss", "pair_accuracy", "chosen_reward", "rejected_reward", "gradient_norm"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], rel=1e-3, abs=1e-5), name


def test_rows_that_are_no_pairs_are_told(tmp_path: Path, toy: Path) -> None:
    def told(rows: list[dict[str, Any]], words: str) -> None:
        pq.write_table(pa.Table.from_pylist(rows, schema=PREFERENCE_ROWS), tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=words):
            train_offline(Dpo, str(tmp_path / "rows.parquet"), str(toy), str(tmp_path / "output"), config(1))

    told([{"row_id": "p/0", "chosen_ids": [1], "rejected_ids": [1, 2], "prompt_length": 1}], "row p/0 cannot be learnt from")
    told([], "dpo needs rows, and there are none")

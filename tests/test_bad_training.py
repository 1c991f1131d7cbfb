"""What cannot be trained is told in one message that says what to change, before anything starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_run import make_root, write_run

from cluster.errors import SpecmillError, UserError
from flows.checks import check_memory
from flows.config import RunRequest
from flows.opening import prepare
from tasks.offline import train_offline
from tasks.sft import Sft
from tasks.stage_config import SftConfig
from tasks.tables import TRAINING_ROWS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def model(tiny_model: str, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(model: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes one of the JSON files of a model."""
    content = json.loads((model / name).read_text())
    change(content)
    (model / name).write_text(json.dumps(content))


def run_with(folder: Path, model: Path, **changes: Any) -> RunRequest:
    """The shipped prompts, on a model."""
    engine = {"model": str(model), "dtype": "float32", "engines": 1, "kv_cache_gib": 0.25}
    content = {"version": 1, "root": str(folder / "root"), "generate": {"engine": engine}, "judge": {"engine": engine}} | changes
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return RunRequest(file=str(folder / "run.yaml"))


TURN = "<|im_start|>{{ m.content }}<|im_end|>"
TEMPLATES = {
    "refuses a system turn": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none of these') }}{% endif %}" + TURN + "{% endfor %}",
        "refuses the turns system user: none of these",
    ),
    "drops a system turn": ("{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}", "'system' turn"),
    "never ends a turn": (
        "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{% endif %}{{ m.content }} .{% endfor %}<|im_start|>",
        "chat template",
    ),
}


@pytest.mark.parametrize("fault", TEMPLATES)
def test_a_chat_template_without_the_needed_turns(tmp_path: Path, model: Path, fault: str) -> None:
    template, words = TEMPLATES[fault]
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=words) as error:
        prepare(run_with(tmp_path, model))
    assert len(str(error.value).splitlines()) == 1


def test_a_model_of_an_architecture_whose_logits_are_scaled(tmp_path: Path, model: Path) -> None:
    edit(model, "config.json", lambda content: content.update(logit_scale=0.5))
    with pytest.raises(UserError, match="logit_scale: such models cannot be trained here"):
        prepare(run_with(tmp_path, model))


def test_a_model_with_layers_to_which_a_packed_row_is_another(tmp_path: Path, model: Path) -> None:
    edit(model, "config.json", lambda content: content.update(layer_types=["conv"] * content["num_hidden_layers"]))
    with pytest.raises(UserError, match="layers of the type conv a packed row is not what it is alone"):
        prepare(run_with(tmp_path, model))


def test_a_model_whose_positions_follow_the_longest_row(tmp_path: Path, model: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    edit(model, "config.json", lambda content: content.update(rope_parameters=rope))
    with pytest.raises(UserError, match="rotary positions of the type dynamic a packed row is not what it is alone"):
        prepare(run_with(tmp_path, model))


@pytest.mark.parametrize(
    ("kind", "name"), [("bloom", "Bloom"), ("rwkv", "Rwkv"), ("opt", "OPT"), ("falcon", "Falcon"), ("gpt_oss", "GptOss")]
)
def test_a_model_whose_masks_know_no_rows(tmp_path: Path, model: Path, kind: str, name: str) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(kind, vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2).save_pretrained(model)
    with pytest.raises(UserError, match=f"packed rows of a {name}ForCausalLM would see each other"):
        prepare(run_with(tmp_path, model))


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is ending whose memory would be waited for."""
    monkeypatch.setattr("cluster.memory.END_SECONDS", 0)


def test_too_little_memory_for_the_engines(tmp_path: Path, model: Path, no_patience: None) -> None:
    engine = {"model": str(model), "dtype": "float32", "engines": 1, "kv_cache_gib": 9000}
    with pytest.raises(
        UserError, match=r"run.yaml: generate: needs about 900\d\.\d GiB .* for generate.engine\), .*lower .*`kv_cache_gib`"
    ):
        check_memory(prepare(run_with(tmp_path, model, generate={"engine": engine}, judge={"engine": engine})), draws=True)


def test_what_is_not_to_be_drawn_needs_no_memory(tmp_path: Path, model: Path, no_patience: None) -> None:
    engine = {"model": str(model), "dtype": "float32", "engines": 1, "kv_cache_gib": 9000}
    run = prepare(run_with(tmp_path, model, generate={"engine": engine}))
    check_memory(run, draws=False)
    with pytest.raises(UserError, match=r"for generate\.engine"):
        check_memory(run, draws=True)


def test_too_little_memory_for_the_ranks(tmp_path: Path, model: Path, no_patience: None) -> None:
    with pytest.raises(UserError, match=r"sft: needs about .* for sft.ranks\), .* GiB are free.*lower `ranks` or train adapters"):
        check_memory(prepare(run_with(tmp_path, model, train=["sft"], sft={"ranks": 4000})), draws=True)


def test_too_little_memory_for_the_ranks_and_the_engines_beside_them(
    tmp_path: Path, model: Path, no_patience: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.memory.free_gib", lambda: 4.5)
    check_memory(prepare(run_with(tmp_path, model, train=["sft"])), draws=True)
    parts = r"\(2\.\d+ for evaluate.engine, 1\.\d+ for judge.engine, 2\.\d+ for rl.ranks\)"
    with pytest.raises(UserError, match=rf"rl: needs about \d\.\d GiB at the same time {parts}, 4.5 GiB are free"):
        check_memory(prepare(run_with(tmp_path, model, train=["sft", "rl"])), draws=True)


def test_a_development_split_in_which_no_refusal_would_be_one_too_many(tmp_path: Path, model: Path) -> None:
    rows = [json.loads(line) for line in (ROOT / "specs" / "prompts" / "violence.jsonl").read_text().splitlines()]
    harmful = [row for row in rows if row["split"] != "dev" or row["cell"] == "violation"]
    assert any(row["split"] == "dev" for row in harmful) and len(harmful) < len(rows)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in harmful))
    changes = {"prompts": str(tmp_path / "prompts.jsonl"), "policy": str(ROOT / "specs" / "policies" / "base"), "train": ["sft"]}
    with pytest.raises(UserError, match=r"the split 'dev' has no benign or borderline prompt .* Set development.over_refusal to 1"):
        prepare(run_with(tmp_path, model, **changes, sft={"development": {}}))
    assert prepare(run_with(tmp_path, model, **changes, sft={"development": {"over_refusal": 1}}))


def test_a_dataset_without_kept_rows_stops_before_training_and_shows_the_funnel(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    content = yaml.safe_load(file.read_text())
    content["judge"]["k"], content["select"]["threshold"] = 6, 5
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(SpecmillError, match=r"(?s)kept 0 rows in 0 categories.*Lower select.threshold.*below_threshold"):
        make_root(file)


def rows_of(folder: Path, *lengths: int) -> str:
    rows = [{"row_id": f"p{number}/0", "input_ids": [1] * length, "prompt_length": 1} for number, length in enumerate(lengths)]
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAINING_ROWS), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def test_a_row_longer_than_the_model(tmp_path: Path, toy: Path) -> None:
    with pytest.raises(UserError, match=r"row p1/0 has 300 tokens, the model .* positions for 256"):
        train_offline(Sft, rows_of(tmp_path, 20, 300), str(toy), str(tmp_path / "output"), SftConfig())


def test_rows_that_are_none(tmp_path: Path, toy: Path) -> None:
    def train(path: str) -> None:
        train_offline(Sft, path, str(toy), str(tmp_path / "output"), SftConfig())

    with pytest.raises(UserError, match="row p1/0 cannot be learnt from"):
        train(rows_of(tmp_path, 20, 1))
    with pytest.raises(UserError, match="sft needs rows, and there are none"):
        train(rows_of(tmp_path))
    with pytest.raises(UserError, match="no such file of training rows"):
        train(str(tmp_path / "nowhere.parquet"))
    (tmp_path / "text.parquet").write_text("input_ids")
    with pytest.raises(UserError, match="no Parquet file with the columns input_ids, prompt_length"):
        train(str(tmp_path / "text.parquet"))


def test_a_place_that_belongs_to_the_training_of_another_model(tmp_path: Path, toy: Path, model: Path) -> None:
    rows, output = rows_of(tmp_path, 20), tmp_path / "output"
    record = {"objective": "sft", "rows": "0" * 64, "model": str(toy), "config": SftConfig().recipe()}
    for place in (output, tmp_path / ".training" / "output"):
        place.mkdir(parents=True)
        (place / "run.json").write_text(json.dumps(record, indent=1))
        with pytest.raises(UserError, match="belongs to a run with other rows, another model or another configuration"):
            train_offline(Sft, rows, str(model), str(output), SftConfig())
        shutil.rmtree(place)

"""Run files: layers, and one clear message with the right exit code for everything that can be wrong with them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from cluster.errors import UserError
from cluster.models import check_trainable
from cluster.training_config import TrainingConfig
from flows.config import RunConfig, RunRequest, load_run, variants
from flows.opening import prepare
from tasks.sources import Source
from tasks.stage_config import SftConfig

RUNS = Path("specs/runs")


@pytest.mark.parametrize("file", sorted(RUNS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_shipped_run_files_are_valid(file: Path):
    config = load_run(RunRequest(file=str(file)))
    assert config.name == file.stem
    assert Path(config.policy).is_dir() and all(Path(source.place).is_dir() for source in config.prompts)


def test_layers_parent_file_changes(tmp_path: Path):
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump({"version": 1, "generate": {"n": 3, "temperature": 0.5}, "judge": {"k": 7}}))
    (tmp_path / "child.yaml").write_text(yaml.safe_dump({"version": 1, "extends": "parent.yaml", "generate": {"n": 4}}))
    request = RunRequest(file=str(tmp_path / "child.yaml"), threshold=2, changes=["judge.k=5", "generate.engine.engines=3"])
    config = load_run(request)
    assert (config.generate.n, config.generate.temperature, config.judge.k) == (4, 0.5, 5)
    assert (config.select.threshold, config.generate.engine.engines) == (2, 3)


def test_a_change_of_what_an_alias_stands_for_is_one_in_its_place_alone(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("version: 1\ngenerate: {engine: &served {engines: 2}}\njudge: {engine: *served}\n")
    config = load_run(RunRequest(file=str(tmp_path / "run.yaml"), changes=["judge.engine.engines=3"]))
    assert (config.generate.engine.engines, config.judge.engine.engines) == (2, 3)


def test_worker_and_shard_counts_are_no_parameters_of_a_run():
    one = load_run(RunRequest(file=str(RUNS / "demo.yaml")))
    other = load_run(
        RunRequest(
            file=str(RUNS / "demo.yaml"),
            root="/elsewhere",
            changes=["generate.engine.engines=7", "generate.shard_rows=99", "sft.ranks=2", "rl.ranks=2", "judge.engine.dtype=bfloat16"],
        )
    )
    assert one.parameters() == other.parameters()
    assert one.parameters() != load_run(RunRequest(file=str(RUNS / "demo.yaml"), samples=5)).parameters()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"generate": {"n": "many"}}, ["generate.n", "many"]),
        ({"generate": {"m": 2}}, ["generate.m", "unknown field"]),
        ({"colour": "red"}, ["colour", "unknown field"]),
        ({"judge": {"temperature": 0}}, ["judge.temperature", "greater than 0"]),
        ({"name": "Not A Name"}, ["name"]),
        ({"extends": "nothing.yaml"}, ["nothing.yaml", "no such file"]),
        ({"sft": {"training": {"zero_stage": 7}}}, ["sft.training.zero_stage"]),
        ({"sft": {"training": {"zero_stage": 1, "offload": True}}}, ["sft.training", "offload: needs zero_stage 2 or 3"]),
        ({"sft": {"training": {"zero_stage": 3, "compile": True}}}, ["sft.training", "compile: needs zero_stage 0, 1 or 2"]),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, content: dict, words: list[str]):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"version": 1, **content}))
    with pytest.raises(UserError) as error:
        load_run(RunRequest(file=str(file)))
    for word in ["run.yaml" if "extends" not in content else "nothing.yaml", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "expected a mapping"), ("- 1", "expected a mapping"), ("a: [", "cannot be read"), ("name: x", "version: is missing")],
)
def test_a_file_that_is_no_run_file_says_so(tmp_path: Path, text: str, words: str):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        load_run(RunRequest(file=str(file)))


def test_defaults_have_titles_and_descriptions_for_the_form():
    def fields(model):
        for name, field in model.model_fields.items():
            yield f"{model.__name__}.{name}", field
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation)

    assert [name for name, field in [*fields(RunRequest), *fields(RunConfig)] if not field.title] == []


def _policy(folder: Path) -> str:
    """The shipped bundle with a clause that excludes one that does not exist."""
    shutil.copytree("specs/policies/base", folder / "policy")
    file = folder / "policy" / "self-harm.yaml"
    content = yaml.safe_load(file.read_text())
    content["clauses"][0]["excludes"] = ["SH99"]
    file.write_text(yaml.safe_dump(content))
    return str(folder / "policy")


def _prompts(folder: Path, text: str) -> str:
    (folder / "prompts.jsonl").write_text(text)
    return str(folder / "prompts.jsonl")


def _run_file(folder: Path, content: dict) -> Path:
    given = {"policy": os.path.abspath("specs/policies/base"), "prompts": os.path.abspath("specs/prompts"), "root": str(folder / "root")}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"version": 1, **given, **content}))
    return file


def _unwritable(folder: Path) -> str:
    (folder / "file").write_text("")
    return str(folder / "file" / "root")


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda folder: {"generate": {"m": 2}}, ["run.yaml: generate.m: unknown field"]),
        (lambda folder: {"generate": {"engine": {"model": "./nowhere"}}}, ["./nowhere", "no such directory", "checkpoint directory"]),
        (lambda folder: {"prompts": _prompts(folder, "")}, ["prompts.jsonl", "not one usable prompt"]),
        (lambda folder: {"policy": _policy(folder)}, ["self-harm.yaml", "SH99", "excludes"]),
        (lambda folder: {"root": _unwritable(folder)}, ["file/root", "cannot be written", "Choose another root"]),
        (lambda folder: {"generate": {"max_tokens": 64}}, ["generate.max_tokens", "longest output"]),
        (lambda folder: {"generate": {"engine": {"max_model_len": 6000}}}, ["generate.engine.max_model_len", "no room for the policy"]),
        (lambda folder: {"rl": {"prompts_per_step": 999}}, ["rl.prompts_per_step", "the RL split has 28"]),
        (lambda folder: {"train": ["rl", "sft", "rl"]}, ["train: rl is there twice", "`rounds`"]),
        (lambda folder: {"train": ["dpo"], "generate": {"n": 1}}, ["dpo compares the samples", "generate.n"]),
        (lambda folder: {"train": ["dpo"], "select": {"pairs": {"per_prompt": 0}}}, ["dpo learns from pairs", "select.pairs.per_prompt"]),
        (lambda folder: {"train": ["rlhf"]}, ["train.0", "'sft', 'rejection', 'dpo' or 'rl'"]),
        (lambda folder: {"rounds": 2, "generate": {"engine": {"backend": "fake"}}}, ["rounds", "backend: vllm"]),
        (lambda folder: {"sft": {"development": {"max_tokens": 50000}}}, ["evaluate.engine.max_model_len", "of the dev split"]),
        (lambda folder: {"select": {"category_threshold": {"cooking": 3}}}, ["select.category_threshold", "cooking"]),
        (lambda folder: {"evaluate": {"engine": {"max_model_len": 300}}}, ["evaluate.engine.max_model_len", "split"]),
    ],
    ids=[
        "unknown field",
        "missing model",
        "empty prompt file",
        "malformed policy",
        "unwritable root",
        "too few tokens",
        "too small a context",
        "too few prompts for RL",
        "a stage twice",
        "nothing to prefer",
        "no pairs",
        "unknown stage",
        "checkpoints for a fake engine",
        "no room for a look",
        "unknown category",
        "no room for a rollout",
    ],
)
def test_a_mistake_is_told_before_anything_starts(tmp_path: Path, mistake: Callable[[Path], dict], words: list[str]):
    with pytest.raises(UserError) as error:
        prepare(RunRequest(file=str(_run_file(tmp_path, mistake(tmp_path)))))
    assert len(str(error.value).splitlines()) == 1
    for word in words:
        assert word in str(error.value)


def test_the_defaults_make_a_run_that_may_start(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("version: 1\n")
    run = prepare(RunRequest(file=str(file), root=str(tmp_path / "root")))
    assert [len(run.split(split)) for split in ("sft", "rl", "dev", "eval")] == [112, 28, 28, 56]


def test_an_inherited_path_is_that_of_the_file_that_names_it(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "extends": os.path.abspath("specs/runs/demo.yaml"), "prompts": "mine.jsonl"}))
    config = load_run(RunRequest(file=str(file)))
    assert config.policy == os.path.abspath("specs/policies/base") and config.prompts == (Source(path=str(tmp_path / "mine.jsonl")),)


def test_the_evaluated_model_is_the_generators_unless_named(tmp_path: Path):
    config = load_run(RunRequest(file=str(_run_file(tmp_path, {"generate": {"engine": {"model": "some/model", "dtype": "float32"}}}))))
    assert (config.evaluate.engine.model, config.evaluate.engine.dtype) == ("some/model", "float32")


@pytest.mark.parametrize("mistake", [{"generate": {"m": 2}}, {"generate": {"engine": {"model": "./nowhere"}}}], ids=["file", "content"])
def test_the_command_shows_one_message_and_the_exit_code(tmp_path: Path, mistake: dict):
    file = _run_file(tmp_path, mistake)
    done = subprocess.run([sys.executable, "-m", "flows.cli", "run", str(file)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("specmill: ") and len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_reading_a_run_file_does_not_import_prefect():
    """Prefect takes its settings from the environment when it is imported; the command makes them from the run file."""
    code = "import sys, flows.config, tasks.store; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "no-such"}, "config.json"),
    ],
)
def test_a_model_that_cannot_be_trained_is_told_before_anything_starts(tiny_model: str, tmp_path: Path, change: Any, message: str) -> None:
    content = json.loads((Path(tiny_model) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=message):
        check_trainable(str(tmp_path))
    check_trainable(tiny_model)


def test_a_sweep_tries_every_combination() -> None:
    found = variants("sft", ["rows=4,12", "sft.training.weight_decay=0,0.1"])
    assert found == [[f"sft.rows={rows}", f"sft.training.weight_decay={decay}"] for rows in (4, 12) for decay in ("0", "0.1")]
    for wrong in ("rows", "rows=", "=4", "rows=4,,5"):
        with pytest.raises(UserError, match="expected field=value,value"):
            variants("sft", [wrong])
    with pytest.raises(UserError, match="110 combinations are more than 100"):
        variants("sft", ["rows=" + ",".join(map(str, range(1, 111)))])


def test_bfloat16_needs_a_stage_that_sums_its_gradients_in_float32() -> None:
    with pytest.raises(ValidationError, match="dtype: bfloat16 needs zero_stage 1, 2 or 3"):
        TrainingConfig(dtype="bfloat16", zero_stage=0)


def test_what_only_bounds_memory_makes_no_other_checkpoint() -> None:
    bounds = {"micro_batch_tokens": 99, "logit_tokens": 99, "gradient_checkpointing": True, "offload": True, "compile": True}
    changed = SftConfig(training=TrainingConfig(**bounds), max_failures=9)  # type: ignore[arg-type]
    assert changed.recipe() == SftConfig().recipe() != SftConfig(training=TrainingConfig(zero_stage=3)).recipe()

"""The run file: one typed document that says what a run does. Model defaults < run file (`extends:` one parent) < changes.

The same models make the YAML, the command line's `--set a.b=c` and the forms of Prefect's UI.
"""

import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.errors import UserError
from tasks.complete import GenerateConfig
from tasks.duplicates import OverlapConfig
from tasks.evaluate import EvaluateConfig
from tasks.gates import GateConfig
from tasks.judge import JudgeConfig
from tasks.rl_config import RlConfig
from tasks.select import SelectConfig
from tasks.sources import Source, Sources, located
from tasks.stage_config import DpoConfig, SftConfig
from tasks.trackers import TrackerName
from tasks.validation import Strict, load_yaml, parse, read_yaml

MOST_VARIANTS = 100


class RunConfig(Strict):
    """A run: policy and prompts in; dataset, checkpoints and report out."""

    version: Literal[1] = Field(1, title="Version", description="Version of the run file's format.")
    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9-]{0,40}$", title="Name", description="Names the dataset and the report.")
    root: str = Field(
        "./out",
        min_length=1,
        title="Root",
        description="Where everything is written: a directory, or s3://bucket/prefix; then training works in SPECMILL_CACHE.",
    )
    lease_seconds: float = Field(
        30, gt=0, le=86400, title="Lease", description="A run whose ledger has not moved for so long is taken to be dead."
    )
    sent_to: dict[str, tuple[str, ...]] = Field(
        {},
        title="Sent to",
        description="Category -> hosts of endpoints that its prompts, answers and spec may be sent to; a category left out stays here.",
    )
    policy: str = Field("specs/policies/base", title="Policy", description="Policy bundle, relative to the run file that names it.")
    prompts: Sources = Field(
        (Source(path="specs/prompts"),),
        min_length=1,
        title="Prompts",
        description="Path of files, a source with a mapping, or a list of these.",
    )
    cases: bool = Field(
        False, title="Policy's cases", description="The cases of the policy's clauses are completed, too, as prompts of the SFT split."
    )
    overlap: OverlapConfig = Field(
        OverlapConfig(), title="Overlap", description="Rows that resemble others, or what models are evaluated on."
    )
    generate: GenerateConfig = Field(GenerateConfig(), title="Generate")
    gates: GateConfig = Field(GateConfig(), title="Gates")
    judge: JudgeConfig = Field(JudgeConfig(), title="Judge")
    select: SelectConfig = Field(SelectConfig(), title="Select")
    train: tuple[Literal["sft", "rejection", "dpo", "rl"], ...] = Field(
        ("sft", "rl"),
        title="Train",
        description="Stages of training, in this order, each from the checkpoint before it: sft, rejection (SFT on all rows that passed "
        "the threshold), dpo, rl.",
    )
    rounds: int = Field(
        1, ge=1, title="Rounds", description="How often everything is done: a round's last checkpoint completes the prompts of the next."
    )
    sft: SftConfig = Field(SftConfig(), title="SFT")
    rejection: SftConfig = Field(SftConfig(), title="Rejection sampling")
    dpo: DpoConfig = Field(DpoConfig(), title="DPO")
    rl: RlConfig = Field(RlConfig(), title="RL")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), title="Evaluate")
    trackers: tuple[TrackerName, ...] = Field(
        (),
        title="Trackers",
        description="Where else the metrics of training are shown: wandb, mlflow. Their keys and addresses are read from the environment.",
    )

    def parameters(self) -> dict[str, Any]:
        """What the run computes. Where and by how many workers it is computed, and how it is called, is left out."""
        content = self.model_dump(
            mode="json", exclude={"root", "name", "lease_seconds", "sent_to", "policy", "prompts", "cases", "overlap", "trackers"}
        )
        for stage in ("generate", "judge", "evaluate"):
            content[stage]["engine"] = {field: content[stage]["engine"][field] for field in ("model", "revision")}
        for stage, fields in (("generate", {"shard_rows"}), ("judge", {"overlap"})):
            content[stage] = {name: value for name, value in content[stage].items() if name not in fields}
        for stage in ("sft", "rejection", "dpo", "rl"):
            content[stage] = getattr(self, stage).recipe()
            if stage not in self.train:
                del content[stage]
        return content

    @model_validator(mode="after")
    def _trains_in_a_sensible_order(self) -> "RunConfig":
        if not self.train:
            raise ValueError("train: name at least one stage; the flow `regenerate` trains none")
        if twice := {stage for stage in self.train if self.train.count(stage) > 1}:
            raise ValueError(f"train: {', '.join(sorted(twice))} is there twice; `rounds` repeats all stages")
        if "dpo" in self.train and self.generate.n < 2:
            raise ValueError("train: dpo compares the samples of a prompt; generate.n has to be 2 or more")
        if "dpo" in self.train and not self.select.pairs.per_prompt:
            raise ValueError("train: dpo learns from pairs; select.pairs.per_prompt has to be 1 or more")
        if self.rounds > 1 and self.generate.engine.backend != "vllm":
            raise ValueError("rounds: from the second one on a checkpoint is the generator, which needs engines of `backend: vllm`")
        return self


class RunRequest(BaseModel):
    """What a person asks for: a run file, and what differs from it this time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field("specs/runs/demo.yaml", title="Run file", description="Path of the run file, on the machine that runs the flow.")
    root: str | None = Field(None, title="Root", description="Write here instead of the run file's root.")
    samples: int | None = Field(None, ge=1, title="Samples per prompt", description="Replaces generate.n.")
    judge_runs: int | None = Field(None, ge=1, title="Judge runs", description="Replaces judge.k.")
    threshold: int | None = Field(None, ge=1, le=5, title="Threshold", description="Replaces select.threshold: lowest score that is kept.")
    changes: list[str] = Field([], title="Other changes", description="Any field as `a.b=value`, for example `sft.epochs=2`.")


def variants(stage: str, vary: Sequence[str]) -> list[list[str]]:
    """Every combination of `field=value,value` of a stage, as changes of a run file. Raises UserError."""
    fields = []
    for entry in vary:
        name, _, values = entry.partition("=")
        if not name.strip() or not all(value.strip() for value in values.split(",")):
            raise UserError(f"--vary {entry!r}: expected field=value,value, for example `--vary training.learning_rate=1e-5,1e-4`.")
        name = f"{stage}.{name.strip().removeprefix(f'{stage}.')}"
        fields.append([f"{name}={value.strip()}" for value in values.split(",")])
    found = [list(changes) for changes in product(*fields)]
    if len(found) > MOST_VARIANTS:
        raise UserError(f"--vary: {len(found)} combinations are more than {MOST_VARIANTS}. Name fewer values.")
    return found


def load_run(request: RunRequest) -> RunConfig:
    """Reads the run file, applies the changes and checks everything. Raises UserError that names file and field."""
    path = Path(request.file)
    content = _with_parent(path, _located(path))
    for name, value in (
        ("root", request.root),
        ("generate.n", request.samples),
        ("judge.k", request.judge_runs),
        ("select.threshold", request.threshold),
    ):
        if value is not None:
            _set(content, name, value)
    for change in request.changes:
        name, equals, value = change.partition("=")
        if not equals or not name:
            raise UserError(f"--set {change!r}: expected field=value, for example `--set judge.k=5`.")
        try:
            _set(content, name.strip(), load_yaml(value))
        except yaml.YAMLError:
            raise UserError(f"--set {change!r}: the value is not YAML.") from None
    if "version" not in content:
        raise UserError(f"{path}: version: is missing; this format is `version: 1`.")
    _name_evaluated_model(content)
    config = parse(RunConfig, content, path)
    return config.model_copy(
        update={
            "policy": os.path.abspath(config.policy),
            "prompts": _absolute(config.prompts),
            "overlap": config.overlap.model_copy(update={"benchmarks": _absolute(config.overlap.benchmarks)}),
            "root": config.root if "://" in config.root else os.path.abspath(config.root),
        }
    )


def _located(path: Path) -> dict[str, Any]:
    """The content of a run file, its policy and prompts taken from where the file lies."""
    content = read_yaml(path)
    overlap = content.get("overlap")
    for group, name in ((content, "policy"), (content, "prompts"), (overlap, "benchmarks")):
        if isinstance(group, dict) and name in group:
            group[name] = located(group[name], lambda place: str(path.resolve().parent / os.path.expanduser(place)))
    return content


def _absolute(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Sources whose paths hold wherever they are read from."""
    return tuple(Source.model_validate(located(source.model_dump(exclude_unset=True), os.path.abspath)) for source in sources)


def _name_evaluated_model(content: dict[str, Any]) -> None:
    """What is evaluated is the generator's model, so it need not be named twice; an endpoint's takes no weights."""
    asked = content.get("generate")
    served = asked.get("engine") if isinstance(asked, dict) else None
    evaluated = content.setdefault("evaluate", {})
    if isinstance(served, dict) and isinstance(evaluated, dict) and served.get("backend") != "openai":
        engine = evaluated.setdefault("engine", {})
        if isinstance(engine, dict):
            for name in ("model", "revision", "dtype", "backend", "fake"):
                if name in served:
                    engine.setdefault(name, served[name])


def _with_parent(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends: expected the path of one run file.")
    inherited = _located(path.parent / parent)
    if "extends" in inherited:
        raise UserError(f"{path}: extends: {parent} extends another file itself; one parent is allowed.")
    if "prompts" in content:
        inherited.pop("prompts", None)  # a mapping fits the source that it was written for, not another one
    return _merge(inherited, content)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _set(content: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"--set {name}: {parent!r} is not a group of fields.")
    content[last] = value

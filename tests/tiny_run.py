"""A run small enough to be damaged a hundred times: a policy of two categories, eight prompts each, fake engines in this process."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cluster.fake_engine import FakeEngine
from flows.config import RunRequest
from flows.opening import prepare
from flows.steps import select_step
from flows.workspace import Workspace, survey
from tasks.checkpoints import finish
from tasks.complete import STAGE as COMPLETIONS
from tasks.complete import CompletionShard, complete_shard
from tasks.judge import STAGE as JUDGEMENTS
from tasks.judge import judge_shard
from tasks.ledger import Ledger

Command = Callable[..., tuple[int, str, str]]
"""The command `specmill`: exit code, output and error output."""
CATEGORIES = {"pets": "PE", "theft": "TH"}
BUNDLE: dict[str, Any] = {
    "version": 1,
    "id": "tiny",
    "title": "A tiny policy",
    "categories": list(CATEGORIES),
    "principles": [{"id": "GP1", "text": "Help as far as the policy allows."}],
    "style": {"refuse": ["One plain sentence."]},
}
ENGINE = {"backend": "fake", "max_model_len": 4096}
RUN: dict[str, Any] = {
    "version": 1,
    "name": "tiny",
    "policy": "policy",
    "prompts": "prompts",
    "root": "root",
    "generate": {"engine": ENGINE, "n": 1, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800},
    "judge": {"engine": ENGINE, "k": 1},
    "select": {"threshold": 1, "min_categories": 1},
}


def category(name: str) -> dict[str, Any]:
    """A category with a clause for what is helped with, one for what is refused, and one that nothing is generated for."""
    letters = CATEGORIES[name]
    return {
        "version": 1,
        "id": name,
        "title": name.title(),
        "summary": f"What concerns {name}.",
        "clauses": [
            {"id": f"{letters}1", "verdict": "comply", "text": f"Questions about {name} are answered.", "excludes": [f"{letters}2"]},
            {"id": f"{letters}2", "verdict": "refuse", "text": f"Harm through {name} is refused."},
            {"id": f"{letters}3", "verdict": "refuse", "text": f"The worst of {name} is refused.", "generate": "never"},
        ],
    }


def row(name: str, number: int = 0, **changes: Any) -> dict[str, Any]:
    """A prompt of a category."""
    return {
        "id": f"{name}-{number}",
        "category": name,
        "cell": "benign",
        "group": f"{name}-{number}",
        "split": "sft",
        "ideal_verdict": "comply",
        "ideal_clauses": [f"{CATEGORIES[name]}1"],
        "messages": [{"role": "user", "content": f"Question {number} about {name}?"}],
    } | changes


def write_run(folder: Path) -> Path:
    """Policy, prompts and a run file; returns the run file."""
    for place in ("policy", "prompts"):
        (folder / place).mkdir(parents=True)
    (folder / "policy" / "bundle.yaml").write_text(yaml.safe_dump(BUNDLE))
    for name in CATEGORIES:
        (folder / "policy" / f"{name}.yaml").write_text(yaml.safe_dump(category(name)))
        rows = [row(name, number) for number in range(8)]
        (folder / "prompts" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN | {"root": str(folder / "root")}))
    return folder / "run.yaml"


def make_root(file: Path) -> Workspace:
    """Everything that the flow `regenerate` makes, and a checkpoint that nobody trained."""
    run = prepare(RunRequest(file=str(file)), trains=False)
    engine = FakeEngine(run.generator.model, run.config.generate.engine)
    completions, judgements = Ledger(run.store, COMPLETIONS), Ledger(run.store, JUDGEMENTS)
    wanted, _ = survey(run, completions, judgements)
    for part, pairs in wanted.missing_completions():
        request = run.requests[part.category]
        shard = CompletionShard(run.store.root, run.generator.model, run.config.generate, request, run.gates, part.path, pairs)
        completions.commit([asyncio.run(complete_shard(engine, shard)).file])
    wanted, _ = survey(run, completions, judgements)
    for source, name, pairs in wanted.judgements_to_make(wanted.missing_runs(run.config.judge, run.limits)):
        judgements.commit([asyncio.run(judge_shard(engine, run.judgement_shard(source, name, pairs))).file])
    run.dataset = select_step.fn(run)
    model = Path(run.store.path("checkpoints/sft-0/model"))
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    finish(run.store, "sft-0", "sft", {"dataset": f"tiny@{run.dataset.version}"}, {"loss": 0.5})
    return run


def told(answer: tuple[int, str, str], code: int, words: list[str], lines: int = 1) -> None:
    """Checks that it is told so, in so many lines and in no more."""
    assert answer[0] == code, answer
    assert answer[2].startswith("specmill: ") and len(answer[2].splitlines()) == lines, answer[2]
    for word in words:
        assert word in answer[2], (word, answer[2])
    assert "Traceback" not in answer[2]

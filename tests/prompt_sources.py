"""What the tests of prompts from other formats share: sources as prompt sets, and files to read them from."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from tasks.duplicates import OverlapConfig
from tasks.policy import load_policy
from tasks.prompt_set import PromptSet, load_prompts
from tasks.prompts import SPLIT_SHARES, Prompt
from tasks.sources import Source
from tasks.store import File, Store

SPECS = Path(__file__).parent.parent / "specs"
POLICY = load_policy(SPECS / "policies" / "base")
LABELS = {"category": "harassment", "cell": "violation", "ideal_verdict": "refuse", "ideal_clauses": "HA11", "split": "sft"}
TEXT = {"columns": {"text": "q"}, "constants": LABELS}


def loaded(root: Path, *sources: dict[str, Any], overlap: dict[str, Any] | None = None) -> PromptSet:
    """Sources as prompts under a root; the counts balance."""
    models = [Source.model_validate(source) for source in sources]
    prompts = load_prompts(Store(str(root / "root")), models, POLICY, OverlapConfig.model_validate(overlap or {}))
    for source in prompts.manifest["sources"]:
        assert source["rows"] == source["prompts"] + source["capability"] + source["quarantined"]
    assert sum(prompts.counts.values()) == sum(source["rows"] for source in prompts.manifest["sources"])
    for file in prompts.manifest["files"]:
        assert prompts.store.verify(File(f"{prompts.path}/{file['path']}", file["bytes"], file["sha256"])) is None
    return prompts


def all_prompts(prompts: PromptSet) -> list[Prompt]:
    """The prompts of all splits."""
    return [prompt for split in SPLIT_SHARES for prompt in prompts.prompts(split)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """A JSONL file of rows; returns its path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    """A CSV file of rows, what is not text as JSON; returns its path."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, restval="")
        writer.writeheader()
        writer.writerows({name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()} for row in rows)
    return str(path)


def only_reason(prompts: PromptSet) -> str:
    """File, line and reason of the one row that is quarantined."""
    (row,) = prompts.manifest["quarantined"]
    return f"{row['file']}:{row['line']}: {row['reason']}"


def write_run_file(folder: Path, content: dict[str, Any]) -> str:
    """A run file with the shipped policy; returns its path."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "policy": str(SPECS / "policies" / "base"), **content}))
    return str(file)

"""Run files that name an endpoint."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from provider import VARIABLE

from flows.config import RunRequest

SPECS = Path(__file__).parent.parent.parent / "specs"
OUTSIDE = {"url": "https://api.example.com/v1", "key_variable": VARIABLE}


def run_file(folder: Path, **changes: Any) -> RunRequest:
    """A run of the category self-harm: a fake generator and an endpoint outside that judges, to which it may be sent."""
    (folder / "prompts").mkdir(exist_ok=True)
    shutil.copy(SPECS / "prompts" / "self-harm.jsonl", folder / "prompts")
    content = {
        "version": 1,
        "name": "remote",
        "root": str(folder / "root"),
        "policy": str(SPECS / "policies" / "base"),
        "prompts": "prompts",
        "generate": {"engine": {"backend": "fake"}, "n": 1, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800},
        "judge": {"engine": outside(), "k": 1, "temperature": 1.0},
        "select": {"threshold": 1},
        "sent_to": {"self-harm": ["API.example.com"]},
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return RunRequest(file=str(folder / "run.yaml"))


def outside(**endpoint: Any) -> dict[str, Any]:
    return {"backend": "openai", "model": "big", "revision": "2026-11-01", "endpoint": OUTSIDE | endpoint}


NATIVE = {"engine": outside(), "thought_format": "native", "n": 1}

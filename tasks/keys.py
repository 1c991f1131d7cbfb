"""Keys: a request is its content. 16 bytes of sha256 over everything that can change a result, and over nothing else.

Not in a key, on purpose: n and k (a larger n or k only adds keys), shard size and worker count (how work is cut is not what it is),
dtype, engine version and endpoint URL (where it ran is recorded with the row, but does not make it another row).
"""

import hashlib
import importlib.metadata
import json
from functools import cache
from pathlib import Path
from typing import Any

KEY_VERSION = 1
KEY_BYTES = 16


def digest(content: Any) -> str:
    """sha256 in hexadecimal over canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def request_prefix(*, spec: str, template: str, model: str, revision: str, sampling: dict[str, Any]) -> str:
    """What all requests of one category share, hashed once: spec, template, model, revision and sampling parameters."""
    return digest(
        {
            "key_version": KEY_VERSION,
            "spec": spec,
            "template": template,
            "model": model,
            "revision": revision,
            "sampling": sampling,
        }
    )


def completion_key(prefix: str, prompt: str, sample: int) -> bytes:
    """The key of sample number `sample` of a prompt (`prompt`: its hash)."""
    return hashlib.sha256(f"{prefix}/{prompt}/{sample}".encode()).digest()[:KEY_BYTES]


def judgement_key(completion: bytes, content: bytes, judge: str, run: int) -> bytes:
    """The key of judge run number `run` on a completion (`judge`: digest of everything that makes the judge's verdict).

    The hash of the completion's content is part of it: a completion that was lost and drawn again may say something else.
    """
    return hashlib.sha256(completion + content + f"/{judge}/{run}".encode()).digest()[:KEY_BYTES]


@cache
def code_version() -> dict[str, str]:
    """What made something: the version of the distribution, and a hash of the sources that ran."""
    sources = Path(__file__).resolve().parent.parent
    files = sorted(file for room in ("cluster", "tasks", "flows") for file in (sources / room).glob("*.py"))
    content = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()
    return {"specmill": importlib.metadata.version("specmill"), "sources": content[:16]}

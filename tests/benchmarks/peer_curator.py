"""Bespoke Curator on the requests of `peers.py`, with its cache on. Runs in the peers' own environment and imports nothing of ours."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

url, folder, in_flight = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
litellm = importlib.util.find_spec("litellm")
assert litellm and litellm.origin
os.environ |= {
    "TELEMETRY_ENABLED": "false",
    "CURATOR_DISABLE_RICH_DISPLAY": "1",
    "CURATOR_CACHE_DIR": str(folder),
    "HF_HUB_OFFLINE": "1",
    # Curator counts tokens with a vocabulary that tiktoken would download; litellm carries the same file.
    "TIKTOKEN_CACHE_DIR": str(Path(litellm.origin).parent / "litellm_core_utils" / "tokenizers"),
}

from bespokelabs import curator  # noqa: E402  (reads the environment as it is imported)
from datasets import Dataset  # noqa: E402

SPECS = json.loads((folder.parent / "specs.json").read_text())
UNLIMITED, FIRST = 10**9, 8


class Writer(curator.LLM):
    """Asks what Specmill asks."""

    def prompt(self, row: dict) -> list[dict]:
        """The conversation."""
        return [{"role": "system", "content": SPECS[row["category"]]}, {"role": "user", "content": row["content"]}]

    def parse(self, row: dict, response: str) -> dict:
        """What is kept."""
        return {"id": row["id"], "answer": response}


rows = [json.loads(line) for line in (folder.parent / "requests.jsonl").open()]
writer = Writer(
    model_name="fake",
    backend="openai",
    generation_params={"max_tokens": 800, "temperature": 1.0},
    backend_params={
        "base_url": url,
        "api_key": "none",
        "max_concurrent_requests": in_flight,
        "max_requests_per_minute": UNLIMITED,
        "max_tokens_per_minute": 1000 * UNLIMITED,
    },
)
writer(Dataset.from_list(rows[:FIRST]))  # loads what is loaded late
dataset = Dataset.from_list(rows)
started = time.monotonic()
made = writer(dataset)
seconds = time.monotonic() - started
made = getattr(made, "dataset", made)
print(json.dumps({"rows": len(set(made["id"])), "seconds": seconds}))

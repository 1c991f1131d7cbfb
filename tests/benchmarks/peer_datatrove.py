"""datatrove's inference runner on the requests of `peers.py`, with checkpoints, one process a core. Imports nothing of ours."""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.writers import JsonlWriter
from loguru import logger

CHUNK, FIRST = 500, 8


async def rollout(document, generate, specs):
    """Asks what Specmill asks."""
    system = {"role": "system", "content": specs[document.metadata["category"]]}
    return await generate({"messages": [system, {"role": "user", "content": document.text}], "max_tokens": 800, "temperature": 1.0})


def run(rows: list[dict], specs: dict[str, str], url: str, folder: Path, in_flight: int, rank: int, ranks: int) -> tuple[float, float]:
    """Does rows; when that began and ended."""
    runner = InferenceRunner(
        rollout_fn=rollout,
        shared_context={"specs": specs},
        config=InferenceConfig(
            server_type="endpoint",
            endpoint_url=url.removesuffix("/v1"),
            model_name_or_path="fake",
            max_concurrent_generations=in_flight // ranks,
        ),
        output_writer=JsonlWriter(str(folder / "out"), output_filename="${rank}_chunk_${chunk_index}.jsonl", compression=None),
        checkpoints_local_dir=str(folder / "checkpoints"),
        records_per_chunk=CHUNK,
    )
    documents = (Document(text=row["content"], id=row["id"], metadata={"category": row["category"]}) for row in rows)
    started = time.monotonic()
    runner.run(documents, rank, ranks)
    return started, time.monotonic()


def work(url: str, folder: Path, in_flight: int, rank: int, ranks: int) -> tuple[float, float]:
    """One rank's share, after some rows that load what is loaded late."""
    logger.remove()
    specs = json.loads((folder.parent / "specs.json").read_text())
    rows = [json.loads(line) for line in (folder.parent / "requests.jsonl").open()][rank::ranks]
    run(rows[:FIRST], specs, url, folder / "first", in_flight, rank, ranks)
    return run(rows, specs, url, folder, in_flight, rank, ranks)


if __name__ == "__main__":
    url, folder, in_flight = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    ranks = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(ranks) as pool:
        times = pool.starmap(work, [(url, folder, in_flight, rank, ranks) for rank in range(ranks)])
    ids = {json.loads(line)["id"] for file in (folder / "out").glob("*.jsonl") for line in file.open()}
    print(json.dumps({"rows": len(ids), "seconds": max(end for _, end in times) - min(start for start, _ in times)}))

"""Generator and judge in turn: the judge's engines start when the generator's are gone, and make what they would have made beside them.

The engines are fake, and the GPUs are numbers that Ray counts: as many as one of the two needs.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.engine import EngineConfig
from cluster.errors import UserError
from cluster.fleet import Fleet
from cluster.pool import RELEASE_SECONDS, Pool
from flows.config import RunRequest
from flows.opening import opened
from flows.steps import complete_and_judge_step
from tasks.ledger import Ledger

pytestmark = pytest.mark.slow
SPECS = Path(__file__).parent.parent / "specs"
GPUS = 2


@pytest.fixture(scope="module")
def gpus() -> Iterator[None]:
    """A Ray that has as many GPUs as one pool needs."""
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 2**28, "_node_ip_address": "127.0.0.1"}
    ray.init(address="local", num_cpus=4, num_gpus=GPUS, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
    ray.shutdown()


def complete_and_judge(folder: Path, overlap: bool, gpus: int) -> dict[str, list[dict[str, Any]]]:
    """Stage -> the rows that two engines of `gpus` GPUs make of it."""
    engine = {"backend": "fake", "engines": GPUS, "max_num_seqs": 4, "gpus": gpus}
    content = {
        "version": 1,
        "name": "in-turn",
        "root": str(folder / "root"),
        "policy": str(SPECS / "policies" / "base"),
        "prompts": str(SPECS / "prompts"),
        "generate": {"engine": engine, "n": 1, "thought_characters": 60, "answer_characters": 60, "max_tokens": 800, "shard_rows": 8},
        "judge": {"engine": engine | {"fake": {"seed": 1}}, "k": 2, "overlap": overlap},
        "select": {"threshold": 1},
    }
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    with opened(RunRequest(file=str(folder / "run.yaml")), trains=False) as run:
        complete_and_judge_step.fn(run)
    return {
        stage: sorted(
            (row for shard in Ledger(run.store, stage).shards() for row in run.store.read_table(shard.path).to_pylist()),
            key=lambda row: row["key"],
        )
        for stage in ("completions", "judgements")
    }


def test_the_judge_takes_the_gpus_that_the_generator_has_given_back(gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.exceptions import RayActorError

    together = complete_and_judge(tmp_path / "together", overlap=True, gpus=0)
    started: list[Fleet] = []
    fleet_of = Pool.fleet

    def watched(pool: Pool) -> Fleet:
        fleet = fleet_of(pool)
        if fleet not in started:
            for actor in [actor for earlier in started for actor in earlier.actors]:
                with pytest.raises(RayActorError):
                    ray.get(actor.ready.remote(), timeout=30)
            started.append(fleet)
        return fleet

    monkeypatch.setattr(Pool, "fleet", watched)
    in_turn = complete_and_judge(tmp_path / "in-turn", overlap=False, gpus=1)
    assert [len(fleet.actors) for fleet in started] == [GPUS, GPUS]
    assert len(in_turn["completions"]) == 112 and in_turn == together


def test_gpus_that_the_cluster_does_not_have_are_not_waited_for(gpus: None) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=f"need {GPUS + 1} GPUs, .* the Ray cluster has {GPUS}"):
        Pool(EngineConfig(backend="fake", tensor_parallel=GPUS + 1, gpus=1)).fleet()
    assert time.monotonic() - started < RELEASE_SECONDS / 2

"""What the driver spends on handing out a shard and taking its receipt, with few engines and with a thousand.

    python tests/benchmarks/feeding.py

The engines are two actors that do nothing; a fleet of a thousand names each of them five hundred times. The driver has a thousand slots
to choose from and two thousand shards in flight, as with a thousand processes; what Ray spends on keeping so many alive is not in it.
"""

import argparse
import sys
import time
from typing import Any

from cluster.engine import EngineConfig
from cluster.fleet import Fleet, Stage
from cluster.pool import Pool
from cluster.session import ray_session

CAPACITY = 64


async def nothing(engine: Any, shard: int) -> bytes:
    """A receipt as long as one for sixty-four rows."""
    return bytes(800)


def feed(engines: int, shards: int, actors: list[Any]) -> None:
    """One line: engines, shards, the driver's time."""
    fleet = Fleet([actors[number % len(actors)] for number in range(engines)], CAPACITY)
    stage = Stage(nothing, size=lambda shard: CAPACITY)
    spent, began = time.process_time(), time.monotonic()
    done = sum(1 for _ in fleet.map(stage, range(shards)))
    spent, seconds = time.process_time() - spent, time.monotonic() - began
    print(
        f"{engines:,} engines: {1000 * spent / done:.2f} ms of the driver's processor a shard, {done / seconds:,.0f} shards/s", flush=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[2, 100, 1000])
    parser.add_argument("--shards", type=int, default=10_000)
    arguments = parser.parse_args()
    from ray import cloudpickle  # behind `cluster`, which makes the settings that Ray reads when it is imported

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with ray_session(), Pool(EngineConfig(backend="fake", engines=2)) as pool:
        for count in arguments.engines:
            feed(count, arguments.shards, pool.fleet().actors)

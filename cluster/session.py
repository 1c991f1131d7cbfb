"""Connects to Ray: attaches to the cluster that `RAY_ADDRESS` names, or starts one on this machine that listens on loopback only."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import UserError

OBJECT_STORE_BYTES = 256 * 2**20
"""Only handles and receipts travel through Ray's object store; the default would reserve a third of the memory."""


@contextmanager
def ray_session() -> Iterator[None]:
    """Everything inside runs on one Ray cluster. Raises UserError when `RAY_ADDRESS` names one that does not answer."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        with _attached(address):
            yield
    else:
        with _local():
            yield


def cluster_gpus() -> float:
    """The GPUs of the Ray cluster that this process is attached to, those in use included."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0))


@contextmanager
def _attached(address: str) -> Iterator[None]:
    import ray

    inside = ray.is_initialized()
    if not inside:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}). Unset it to run locally.") from error
    try:
        yield
    finally:
        if not inside:
            ray.shutdown()


@contextmanager
def _local() -> Iterator[None]:
    # A Unix socket's path may have 107 bytes, so Ray's directory is a short one of its own.
    temp = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more a training, and no node is taken from this cluster
    import ray

    # Logical CPUs: idle engines use none, so trainers and engines may be counted on the same cores.
    cores = os.cpu_count() or 1
    ray.init(
        address="local",
        num_cpus=4 * cores,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=temp,
        _node_ip_address="127.0.0.1",
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(temp, ignore_errors=True)

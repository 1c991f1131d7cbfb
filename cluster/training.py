"""Runs an SPMD training loop on a Ray Train worker group that restarts by itself and continues from its last checkpoint.

Promises: a checkpoint is complete (every rank has stored its share) or invisible; the same storage and name continue where the
last complete checkpoint was taken, after a crash of a worker, of the driver or of the machine; an interrupt stops the workers
and reaches the caller. Nothing here knows a model: loops call `report` and `resume` with their engine.
"""

import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.errors import Diverged, SpecmillError, UserError
from cluster.training_config import WorkersConfig

if TYPE_CHECKING:
    from cluster.deepspeed_engine import TrainingEngine

T = TypeVar("T")

ABORT_SECONDS = 30.0
"""How long an interrupted run waits for its workers to stop in order."""

FINAL = (UserError, Diverged)
"""What a worker raises that would be raised again."""

UNFINISHED = ".checkpoint-"
"""Beginning of the names of directories in which a rank saves its share before it is moved to its place."""

BESIDE = "beside"
"""Directory of a checkpoint on a remote storage: what the run's working directory has beside it."""

CHECKPOINT_S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,  # workers write what the controller looks for
    "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 8}, "connect_timeout": 10, "read_timeout": 60},
}
"""How a remote storage is reached: one that does not answer is asked again, with pauses of up to 20 s in between."""

COLLECTIVE_SECONDS = 1800
"""How long a rank waits for its peers in a collective, among others while a peer loads a large model."""


def keep_memory() -> dict[str, str]:
    """Environment in which a process on a CPU keeps for a while what tensors free; empty where Ray brings no jemalloc.

    By default every large tensor is fresh memory of the kernel, which clears it page by page. glibc, told to keep it, keeps twice what a
    rank needs, and so does jemalloc for ever or if it may not take small pieces from large ones.
    """
    import ray

    allocator = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    settings = "narenas:1,oversize_threshold:0,dirty_decay_ms:30000,lg_extent_max_active_fit:20"
    return {"LD_PRELOAD": str(allocator), "MALLOC_CONF": settings} if allocator.exists() else {}


def run_workers(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    workers: WorkersConfig,
    *,
    storage: str,
    name: str,
) -> None:
    """Calls `loop(config)` on the workers and returns when it has returned on all of them.

    `storage` is a directory that all nodes see, or any fsspec URL; the run keeps its newest checkpoint under `<storage>/<name>`. Workers
    have another working directory, so paths in `config` are absolute. A worker that dies restarts the whole group, at most
    `workers.max_failures` times; a UserError or Diverged ends the run at once. Raises what a worker raised of these, and SpecmillError for
    every other end.
    """
    from ray.exceptions import RayActorError
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util import get_node_ip_address

    def worker(settings: dict[str, Any]) -> None:
        prepare_worker()
        loop(settings)

    place, filesystem = _storage(storage)
    # On a cluster that lives on the loopback interface the ranks must not look for each other anywhere else.
    environment = {"GLOO_SOCKET_IFNAME": "lo"} if get_node_ip_address() == "127.0.0.1" else {}
    if not workers.gpus_per_rank:
        environment |= keep_memory()
    trainer = _interruptible_trainer()(
        worker,
        train_loop_config=config,
        torch_config=TorchConfig(timeout_s=COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=workers.ranks,
            use_gpu=workers.gpus_per_rank > 0,  # one each
            resources_per_worker={"CPU": workers.cpus_per_rank},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=place,
            storage_filesystem=filesystem,
            # Without a limit of its own a group that finds no room in the cluster would be started for ever.
            failure_config=FailureConfig(max_failures=workers.max_failures, controller_failure_limit=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[_without_retries()],
            worker_runtime_env={"env_vars": environment},
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, RayActorError) as error:
        raise _translated(name, error) from error
    except BaseException:
        trainer.stop_workers()
        raise


def report(metrics: dict[str, Any], engine: "TrainingEngine", state: dict[str, Any], work: Path, beside: Sequence[str] = ()) -> float:
    """Stores a checkpoint of the engine and of `state` (small JSON) with rank 0's metrics. All ranks call it together.

    Returns the seconds that it took. Where the storage is a directory the files are written there and moved to their place. A remote one
    gets a copy, also of what rank 0 has `beside` it in `work`, the run's working directory: another machine may go on from there.
    """
    import ray.train

    started, storage, run = time.monotonic(), ray.train.get_context().get_storage(), _run_directory()
    if run:
        try:
            storage._check_validation_file()  # as Ray does before it copies: a node may have a directory of its own by this name
        except RuntimeError as error:
            raise UserError(f"{run}: not the run's directory on this node. All nodes have to see the same one there.") from error

    def moved(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        place = storage.build_checkpoint_path_from_name(name)
        shutil.copytree(checkpoint.path, place, copy_function=os.replace, dirs_exist_ok=True)
        return ray.train.Checkpoint(place, storage.storage_filesystem)

    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=run or work) as directory:
        engine.save(directory, state)
        for name in beside if not run and engine.rank == 0 else ():
            _copy(work / name, Path(directory) / BESIDE / name)
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_fn=moved if run else None)
    return time.monotonic() - started


def resume(engine: "TrainingEngine", work: Path) -> dict[str, Any] | None:
    """Loads the run's last complete checkpoint into the engine and returns its state; None at the beginning of a run.

    What a remote storage holds beside it comes back into `work`. What a rank that was killed had not yet saved in full is removed.
    """
    import ray.train

    run = _run_directory()
    if not run and not work.is_dir():
        raise UserError(f"{work}: not there on this node. All nodes have to see the same directory there (SPECMILL_CACHE).")
    if engine.rank == 0:
        for unfinished in (run or work).glob(f"{UNFINISHED}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
    agreed(None)  # before any rank saves
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    if run:
        return engine.load(checkpoint.path)
    directory = work / f"{UNFINISHED}fetched"
    if engine.rank == 0:
        checkpoint.to_directory(directory)
        for path in (directory / BESIDE).glob("*"):
            _copy(path, work / path.name)
    agreed(None)
    state = engine.load(directory)
    agreed(None)
    if engine.rank == 0:
        shutil.rmtree(directory)
    return state


def agreed(value: T) -> T:
    """Rank 0's value on every rank; all of them call it together."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def prepare_worker() -> None:
    """Shares the node's cores among its ranks (Ray allows one thread each) and keeps libraries from narrating.

    Denormal numbers, which the tails of a softmax are full of, count as zero: a CPU multiplies them a hundred times slower.
    """
    import torch

    torch.set_flush_denormal(True)  # before torch starts its threads, which inherit it
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    os.environ["TQDM_DISABLE"] = "1"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _storage(storage: str) -> tuple[str, Any]:
    """The path of a storage and its filesystem, which is Ray's own for a directory."""
    if "://" not in storage:
        return str(Path(storage).absolute()), None
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    class Buckets(FSSpecHandler):
        """An object store, in which no directory needs to be made: to look for the bucket takes rights that a prefix does not give."""

        def create_dir(self, path: str, recursive: bool) -> None:
            """Nothing to do."""

    s3 = storage.startswith(("s3://", "s3a://"))
    filesystem, path = fsspec.core.url_to_fs(storage, **(CHECKPOINT_S3_OPTIONS if s3 else {}))
    return path, PyFileSystem((Buckets if s3 else FSSpecHandler)(filesystem))


def _copy(source: Path, target: Path) -> None:
    """Copies a file or a directory, over what is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def _run_directory() -> Path | None:
    """Where the run keeps its checkpoints, if that is a directory."""
    import ray.train
    from pyarrow.fs import LocalFileSystem

    storage = ray.train.get_context().get_storage()
    return Path(storage.experiment_fs_path) if isinstance(storage.storage_filesystem, LocalFileSystem) else None


def _interruptible_trainer() -> Any:
    """TorchTrainer whose `fit` lets KeyboardInterrupt through.

    Ray's own answer to SIGINT aborts the run, ends the whole process with exit code 0 and stays installed afterwards.
    """
    import ray
    from ray.train.torch import TorchTrainer

    class InterruptibleTrainer(TorchTrainer):
        _controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self._controller = controller

        def stop_workers(self) -> None:
            if self._controller is None:
                return
            try:
                ray.get(self._controller.abort.remote(), timeout=ABORT_SECONDS)
            except ray.exceptions.RayActorError:
                pass  # the controller ends itself when it has stopped its workers
            except ray.exceptions.GetTimeoutError:
                ray.kill(self._controller)

    return InterruptibleTrainer


def _without_retries() -> Any:
    """Ends a run whose workers raise what would come again: Ray Train counts every exception as a failure to be retried."""
    from ray.train import UserCallback
    from ray.train.v2.api.exceptions import ControllerError

    class WithoutRetries(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for failure in worker_exceptions.values():
                if isinstance(failure, FINAL):
                    raise ControllerError(failure)

    return WithoutRetries()


def _translated(name: str, error: Exception) -> SpecmillError:
    """What a worker raised if it is final, else an error that says which rank failed, with the end of its traceback."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for failure in [getattr(error, "controller_failure", None), *failures.values()]:
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, FINAL):
            return cause
    text = "\n".join(f"rank {rank}: {failure}" for rank, failure in sorted(failures.items())) or str(error)
    return SpecmillError(f"training {name!r} failed for good:\n{text}")

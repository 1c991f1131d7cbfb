"""Reads and checks what a run needs, and opens its workspace. The outermost flow opens it, inner flows find it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from cluster.engine import EngineConfig
from cluster.errors import UserError
from cluster.pool import Pool
from cluster.session import ray_session
from flows.checks import check_data, check_gpus, check_training
from flows.config import RunConfig, RunRequest, load_run
from flows.workspace import Workspace
from tasks.policy import Policy, load_policy
from tasks.progress import say
from tasks.prompt_set import PromptSet, load_prompts
from tasks.store import Store
from tasks.tombstones import deleted_prompts

_current: ContextVar[Workspace | None] = ContextVar("workspace", default=None)


@contextmanager
def opened(request: RunRequest, trains: bool = True) -> Iterator[Workspace]:
    """The workspace of a request; the one of the enclosing flow if there is one. `trains`: whether checkpoints will be written."""
    outer = _current.get()
    if outer is not None:
        yield outer
        return
    with ExitStack() as stack:
        workspace = _open(request, trains, stack)
        token = _current.set(workspace)
        try:
            yield workspace
        finally:
            _current.reset(token)


def prepare(request: RunRequest, trains: bool = True) -> Workspace:
    """Reads and checks everything that a run needs, without starting anything. Raises UserError that says what to change."""
    config = load_run(request)
    policy = load_policy(config.policy)
    store = Store(config.root)
    store.check_writable()
    with said_of(request.file):
        prompts = load_prompts(store, config.prompts, policy, config.overlap, deleted_prompts(store), config.cases)
        workspace = _with_pools(request.file, config, policy, prompts, store, trains)
        check_data(workspace)
        if trains:
            check_training(workspace)
    return workspace


@contextmanager
def said_of(place: str) -> Iterator[None]:
    """Puts a file, or a field of it, before what is wrong there."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _with_pools(file: str, config: RunConfig, policy: Policy, prompts: PromptSet, store: Store, trains: bool) -> Workspace:
    """The workspace and its pools of engines, whose models are there. Raises UserError."""
    generator = Pool(config.generate.engine)
    judge = generator if config.judge.engine == config.generate.engine else Pool(config.judge.engine)
    policy_engine = Pool(config.evaluate.engine, receives_weights=True)
    if config.evaluate.engine.remote:
        raise UserError("evaluate.engine.backend: an endpoint takes no weights, and RL and evaluation replace them by each checkpoint's.")
    held_out = Pool(config.rl.held_out) if config.rl.held_out and trains and "rl" in config.train else None
    pools = {"generate.engine": generator, "judge.engine": judge, "evaluate.engine": policy_engine, "rl.held_out": held_out}
    for place, pool in pools.items():
        if pool and (trains or pool is not policy_engine):
            with said_of(place):
                pool.model  # noqa: B018  (raises when there is no such model)
    if config.generate.engine.backend == "vllm" and policy_engine.model != generator.model:
        raise UserError("evaluate.engine.model: has to be the generator's model; its weights are replaced by each checkpoint's.")
    return Workspace(config, policy, prompts, store, generator, judge, policy_engine, file, trains, held_out)


def _open(request: RunRequest, trains: bool, stack: ExitStack) -> Workspace:
    workspace = prepare(request, trains)
    workspace.check_keys()
    counts, shown = workspace.prompts.counts, workspace.prompts.manifest["quarantined"]
    say(f"run {workspace.run_id}: {counts['prompts']} prompts, {counts['capability']} capability rows -> {workspace.store.root}")
    for row in shown:
        say(f"  quarantined {row['file']}:{row['line']}: {row['reason']}")
    if counts["quarantined"] > len(shown):
        say(f"  and {counts['quarantined'] - len(shown)} more: {workspace.store.path(workspace.prompts.path)}/quarantined")
    overlap = workspace.prompts.manifest["overlap"]
    if overlap["near_duplicates"] or overlap["contaminated"]:
        found = f"{overlap['near_duplicates']} near-duplicates, {overlap['contaminated']} like evaluation prompts"
        say(f"  overlap: {found}, {overlap['dropped']} dropped (`specmill prompts check` shows them)")
    generator, judge = workspace.generator, workspace.judge
    if judge is not generator and judge.model == generator.model and not judge.config.remote:
        differ = [name for name in EngineConfig.model_fields if getattr(judge.config, name) != getattr(generator.config, name)]
        say(f"  judge      has engines of its own, of the generator's model: judge.engine differs in {', '.join(differ)}")
    stack.enter_context(ray_session())
    if trains:
        with said_of(request.file):
            check_gpus(workspace)
    for pool in workspace.pools:
        stack.enter_context(pool)
    workspace.engines = stack
    return workspace

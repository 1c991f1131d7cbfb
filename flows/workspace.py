"""What the flows of one run share: the checked inputs, the store and the engines. The outermost flow opens it, inner flows find it."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property

from cluster.chat import chat_of
from cluster.engine import EngineConfig
from cluster.errors import UserError
from cluster.models import Model, check_trainable
from cluster.pool import Pool
from cluster.session import cluster_gpus, ray_session
from cluster.training import check_memory
from flows.config import RunConfig, RunRequest, load_run
from tasks.checkpoints import Checkpoint
from tasks.complete import Request, requests
from tasks.compose import plain_turns
from tasks.dataset import Dataset, Selection
from tasks.gates import Gates
from tasks.judge import JudgementShard, judge_hash
from tasks.keys import digest
from tasks.ledger import Ledger
from tasks.policy import Policy, Spec, load_policy
from tasks.progress import say
from tasks.prompt_set import PromptSet, load_prompts
from tasks.prompts import Prompt, Split, may_be_helped
from tasks.stage_config import StageConfig
from tasks.store import Shard, Store
from tasks.tombstones import deleted_prompts
from tasks.trackers import check_trackers
from tasks.wanted import Wanted
from tasks.work import Pairs, Tally, Wall

_current: ContextVar["Workspace | None"] = ContextVar("workspace", default=None)


@dataclass
class Workspace:
    """An opened run."""

    config: RunConfig
    policy: Policy
    prompts: PromptSet
    store: Store
    generator: Pool
    judge: Pool
    policy_engine: Pool
    held_out: Pool | None = None
    """The judge that rewards nothing, if RL is to have one."""
    dataset: Dataset | None = None
    selections: list[Selection] = field(default_factory=list)
    """Of each round."""
    checkpoints: list[Checkpoint] = field(default_factory=list)
    round: int = 1
    engines: ExitStack = field(default_factory=ExitStack)
    """Ends the engines that a later round starts."""
    notes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Stage -> what was reused, made, lost and quarantined in this invocation."""
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)
    """Stage -> how fast it was in this invocation."""
    _splits: dict[Split, list[Prompt]] = field(default_factory=dict)
    _requests: dict[Model, dict[str, Request]] = field(default_factory=dict)

    def begin_round(self, number: int, checkpoint: Checkpoint) -> None:
        """From now on a checkpoint completes the prompts. What judges stays what it was; engines give their memory back."""
        for pool in self.pools:
            if pool is not self.judge or not self.config.judge.overlap:
                pool.close()
        self.round, self.dataset = number, None
        self.generator = self.engines.enter_context(Pool(self.config.generate.engine, model=checkpoint.model))
        self.generator.check_memory()

    def label(self, name: str) -> str:
        """The name of a stage or a checkpoint, with the number of the round if it is not the first."""
        return name if self.round == 1 else f"{name}-{self.round}"

    @property
    def run_id(self) -> str:
        """Name of the run's directory: its name and the beginning of its identity."""
        return f"{self.config.name}-{self.identity[:10]}"

    @cached_property
    def identity(self) -> str:
        """Hash of policy, prompts, models and parameters, taken in the first round."""
        specs = {name: spec.hash for name, spec in self.specs.items()}
        models = [self.generator.model.id, self.generator.model.revision, self.judge.model.id, self.judge.model.revision]
        return digest([specs, self.prompts.hash, models, self.config.parameters()])

    @property
    def requests(self) -> dict[str, Request]:
        """Category -> what the generator of this round is asked."""
        model = self.generator.model
        if model not in self._requests:
            self._requests[model] = requests(self.policy, model, self.config.generate)
        return self._requests[model]

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Category -> spec(category), the same for generator and judge."""
        return {category: request.spec for category, request in self.requests.items()}

    @cached_property
    def gates(self) -> Gates:
        """What the gates compare with."""
        return Gates.of(self.config.gates, self.policy)

    @cached_property
    def limits(self) -> dict[str, int]:
        """Category -> lowest score that is kept."""
        return {category: self.config.select.limit(category) for category in self.policy.categories}

    def allowed_hosts(self, category: str) -> set[str]:
        """Hosts that what belongs to a category may be sent to, in lower case."""
        return {host.lower() for host in self.config.sent_to.get(category, ())}

    def judgement_shard(self, source: Shard, category: str, pairs: Pairs) -> JudgementShard:
        """Runs of the judge on completions of one shard."""
        spec, limit = self.specs[category], self.limits[category]
        digest, judge = self.judge_hash("full"), self.judge.model
        return JudgementShard(self.store.root, judge, self.config.judge, digest, spec, source.path, pairs, limit)

    def split(self, name: Split) -> list[Prompt]:
        """The prompts of a split that is small enough to be held in memory."""
        if name not in self._splits:
            self._splits[name] = list(self.prompts.prompts(name))
        return self._splits[name]

    def judge_hash(self, view: str) -> str:
        """Identity of the judge for a view: `full` or `blind`."""
        return judge_hash(self.judge.model, self.config.judge, view)

    @property
    def base_model(self) -> Model:
        """The model that is trained: the generator, or, where that is behind an endpoint, the one that `evaluate` names."""
        return self.policy_engine.model

    def check_keys(self) -> None:
        """Raises UserError when an endpoint's key is not in this process's environment."""
        for pool in self.pools:
            pool.check_key()

    def start(self, pool: Pool, needed: bool = True) -> None:
        """Starts the engines of a pool. They take up to a minute; a person should know what is being waited for."""
        if needed and not pool.started:
            say(f"  starting {pool.config.engines} x {pool.model.id}")
            pool.fleet()

    def free_gpus(self, *needed: Pool) -> None:
        """Ends the engines that hold GPUs, but for those of the pools that are needed; training would wait for these GPUs for ever."""
        for pool in self.pools:
            if pool.config.gpus and pool not in needed:
                pool.close()

    @property
    def pools(self) -> list[Pool]:
        """All pools, each once."""
        pools = (self.generator, self.judge, self.policy_engine, self.held_out)
        return list({id(pool): pool for pool in pools if pool}.values())

    def tell_speed(self, pool: Pool, wall: Wall, tallies: dict[str, Tally]) -> None:
        """Remembers and tells how fast engines of a pool made what."""
        for stage, tally in tallies.items():
            if tally.asked:
                speed = self.speeds[self.label(stage)] = tally.speed(wall.seconds)
                say(
                    f"  {stage:<10} {speed['rows_per_second']:.3g} rows/s, {speed['tokens_per_second']:.3g} tokens/s, "
                    f"{100 * speed['cached']:.0f} % of prompt tokens cached, {speed['retries']} retries, {speed['quarantined']} quarantined"
                    + (f", for {tally.usage.cost:,.2f}" if tally.usage.cost else "")
                )
        busy = sum(tally.usage.busy_seconds for tally in tallies.values())
        if busy:
            engines = "engines" if pool is self.generator else "judge engines"
            idle = self.speeds[self.label(engines)] = {
                "idle": max(0.0, 1 - busy / (pool.config.engines * wall.seconds)),
                "tail": wall.tail / wall.seconds,
                "seconds": wall.seconds,
            }
            say(f"  {engines:<10} idle {100 * idle['idle']:.1f} % of {wall.seconds:.0f} s, tail {100 * idle['tail']:.1f} %")

    def note(self, stage: str, **counts: int) -> None:
        """Remembers and tells what a stage did."""
        self.notes[stage] = counts
        say(f"  {stage:<10} " + ", ".join(f"{count} {name}" for name, count in counts.items()))


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
        prompts = load_prompts(store, config.prompts, policy, config.overlap, deleted_prompts(store))
        workspace = _with_pools(config, policy, prompts, store, trains)
        _check(workspace)
        if trains:
            _check_training(workspace)
    return workspace


@contextmanager
def said_of(place: str) -> Iterator[None]:
    """Puts a file, or a field of it, before what is wrong there."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _with_pools(config: RunConfig, policy: Policy, prompts: PromptSet, store: Store, trains: bool) -> Workspace:
    """The workspace and its pools of engines, whose models are there and fit in memory. Raises UserError."""
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
                pool.check_memory()
    if config.generate.engine.backend == "vllm" and policy_engine.model != generator.model:
        raise UserError("evaluate.engine.model: has to be the generator's model; its weights are replaced by each checkpoint's.")
    if config.rounds > 1 and config.judge.overlap and trains and judge is generator:
        engine = config.generate.engine  # from the second round on a pool of their own judges
        Pool(engine.model_copy(update={"engines": 2 * engine.engines})).check_memory()
    return Workspace(config, policy, prompts, store, generator, judge, policy_engine, held_out)


def survey(run: Workspace, completions: Ledger, judgements: Ledger) -> tuple[Wanted, tuple[list[str], list[str]]]:
    """What the run wants and what of it is there; and the shards of both ledgers that are gone."""
    wanted = Wanted.of(run.prompts, "sft", run.requests, run.config.generate.n, run.config.judge.k)
    lost = wanted.mark_completions(run.store, completions.shards(), run.gates, run.specs)
    return wanted, (lost, wanted.mark_judgements(run.store, judgements.shards(), run.judge_hash("full")))


def _check(run: Workspace) -> None:
    """What would otherwise be found out hours later. Raises UserError."""
    config = run.config
    run.requests  # noqa: B018  (raises when a grammar or a policy does not fit)
    by_category: dict[str, Iterable[str]] = {
        "select.category_threshold": config.select.category_threshold,
        "sent_to": config.sent_to,
        "rl.reward.sections": config.rl.reward.sections,
    }
    for name, categories in by_category.items():
        for category in categories:
            if category not in run.policy.categories:
                raise UserError(f"{name}: {category!r} is no category of the policy ({', '.join(run.policy.categories)}).")
    engines = {"generate.engine": config.generate.engine, "judge.engine": config.judge.engine}
    for stage, engine in (engines | ({"rl.held_out": run.held_out.config} if run.held_out else {})).items():
        _check_host(run, stage, engine)
    if not run.prompts.size("sft"):
        raise UserError(f"{run.prompts.manifest['source']}: not one scenario group falls to the split 'sft'. Add scenario groups.")


def _check_host(run: Workspace, stage: str, engine: EngineConfig) -> None:
    """Raises UserError when a category that has prompts may not be sent to the endpoint of a stage."""
    host = host_outside(engine)
    closed = [name for name in sorted({part.category for part in run.prompts.parts}) if host not in run.allowed_hosts(name)]
    if host and closed:
        raise UserError(
            f"{stage}.endpoint: the run file does not allow sending {', '.join(closed)} to {host}. Add the host to `sent_to` "
            "of each category that may leave this machine, or take the prompts of the others out."
        )


def host_outside(engine: EngineConfig) -> str | None:
    """The host that an engine sends its requests to, None when they stay on this machine or cluster."""
    return engine.remote.host if engine.remote and not engine.remote.loopback else None


def _check_training(run: Workspace) -> None:
    """The same for training and evaluation: prompts of the other splits, and room for them and for the ranks."""
    config = run.config
    few = (
        "Add scenario groups, or name the `split` of some: by their names, of eight groups four go to SFT, one to RL, one to development, "
        "two to evaluation."
    )
    trains_rl = "rl" in config.train
    if trains_rl and run.prompts.size("rl") < config.rl.prompts_per_step:
        wanted = config.rl.prompts_per_step
        raise UserError(f"rl.prompts_per_step: {wanted} prompts are wanted, the RL split has {run.prompts.size('rl')}. Lower it. {few}")
    cells = {prompt.cell for prompt in run.split("rl")} if trains_rl else set()
    if missing := sorted(set(config.rl.mix) - cells):
        raise UserError(f"rl.mix: the RL split has no prompts of the cell {', '.join(missing)}; it has {', '.join(sorted(cells))}.")
    if {cell for cell in cells if cell in config.rl.mix or not config.rl.mix} == {"violation"}:
        say("  rl         draws harmful prompts only: models learn to refuse without a thought. Add prompts of other cells, or see rl.mix.")
    if not run.prompts.size("eval"):
        raise UserError(f"{run.prompts.manifest['source']}: not one scenario group falls to the split 'eval'. Add scenario groups.")
    check_trackers(config.trackers)
    check_trainable(run.base_model.path)
    for name in config.train:
        stage: StageConfig = getattr(config, name)
        check_memory(run.base_model.path, stage, stage.training, reference=name == "rl" and config.rl.kl > 0)
    chat, context = chat_of(run.base_model.path), config.evaluate.engine.max_model_len
    limits: dict[Split, int] = {"eval": config.evaluate.max_tokens}
    if trains_rl:
        limits["rl"] = config.rl.max_tokens
    stages = {"sft": config.sft, "rejection": config.rejection, "dpo": config.dpo}
    looks = [stage.development for name, stage in stages.items() if name in config.train and stage.development]
    if looks:
        limits["dev"] = max(look.max_tokens for look in looks)
        if not run.prompts.size("dev"):
            raise UserError(f"development: not one scenario group falls to the split 'dev'. {few}")
        gated = any(look.over_refusal < 1 for look in looks)
        if gated and not any(may_be_helped(prompt.ideal_verdict, prompt.cell) for prompt in run.split("dev")):
            raise UserError(
                "development: the split 'dev' has no benign or borderline prompt that may be helped with, so over-refusal could not be "
                f"seen. Set development.over_refusal to 1 if it may be. {few}"
            )
    for split, limit in limits.items():
        for prompt in run.split(split):
            length = len(chat.prompt(plain_turns(prompt.messages)))
            if length + limit > context:
                raise UserError(
                    f"evaluate.engine.max_model_len: prompt {prompt.id!r} of the {split} split has {length} tokens, which with {limit} to "
                    f"draw exceed {context}. Raise it, or take the prompt out."
                )


def check_gpus(run: Workspace) -> None:
    """Raises UserError when a stage of training and the engines that work beside it need more GPUs than the Ray cluster has.

    Found out by Ray Train, that would be told hours later and in its words.
    """
    total = cluster_gpus()
    for name in run.config.train:
        stage: StageConfig = getattr(run.config, name)
        if name == "rl":
            beside = {"evaluate.engine": run.policy_engine, "rl.held_out": run.held_out}
            beside |= {"judge.engine": run.judge if run.config.rl.asks_judge else None}
        else:
            beside = {"evaluate.engine": run.policy_engine if getattr(stage, "development", None) else None}
        parts = {f"{name}.ranks": float(stage.ranks * stage.gpus_per_rank)}
        parts |= {place: pool.config.engines * pool.config.tensor_parallel * pool.config.gpus for place, pool in beside.items() if pool}
        if stage.gpus_per_rank and sum(parts.values()) > total:
            needed = ", ".join(f"{gpus:g} for {place}" for place, gpus in parts.items() if gpus)
            raise UserError(
                f"{name}: needs {sum(parts.values()):g} GPUs at the same time ({needed}), the Ray cluster has {total:g}. Lower ranks or "
                "engines, or let engines share a GPU: `gpus` below 1 and a smaller `gpu_memory_utilization`."
            )


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

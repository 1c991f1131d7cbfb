"""What the flows of one run share: the checked inputs, the store and the engines."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

from cluster.memory import free_gib, ranks_gib
from cluster.models import Model
from cluster.pool import Pool
from flows.config import RunConfig
from tasks.checkpoints import Checkpoint
from tasks.complete import Request, requests
from tasks.dataset import Dataset, Selection
from tasks.gates import Gates
from tasks.judge import JudgementShard, judge_hash
from tasks.keys import digest
from tasks.ledger import Ledger
from tasks.policy import Policy, Spec
from tasks.progress import say
from tasks.prompt_set import PromptSet
from tasks.prompts import Prompt, Split
from tasks.stage_config import StageConfig
from tasks.store import Shard, Store
from tasks.wanted import Wanted
from tasks.work import Pairs, Tally, Wall


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
    file: str = ""
    """The run file, for messages."""
    trains: bool = True
    """Whether checkpoints will be written."""
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

    def beside(self, stage: str) -> dict[str, Pool]:
        """The pools whose engines work while a stage of training does, by their place in the run file."""
        config = self.config
        if stage != "rl":
            return {"evaluate.engine": self.policy_engine} if getattr(config, stage).development else {}
        found = {"evaluate.engine": self.policy_engine, "judge.engine": self.judge if config.rl.asks_judge else None}
        return {place: pool for place, pool in (found | {"rl.held_out": self.held_out}).items() if pool}

    def ranks_gib(self, stage: str) -> float:
        """What the ranks of a stage of training take of this machine's memory."""
        config: StageConfig = getattr(self.config, stage)
        reference = stage == "rl" and self.config.rl.kl > 0
        return ranks_gib(self.base_model.path, config, config.training, reference)

    def make_room(self, *needed: Pool, gib: float = 0.0, gpus: bool = False) -> None:
        """Ends engines that are not needed: with `gpus` those that hold one, for which ranks would wait for ever; and those on this machine
        where its memory has no room for the needed ones that are not there yet and `gib` more."""
        more = gib + sum(pool.memory_gib for pool in needed if not pool.started)
        short = more > free_gib()
        for pool in self.pools:
            if pool not in needed and ((gpus and pool.config.gpus) or (short and pool.memory_gib)):
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


def survey(run: Workspace, completions: Ledger, judgements: Ledger) -> tuple[Wanted, tuple[list[str], list[str]]]:
    """What the run wants and what of it is there; and the shards of both ledgers that are gone."""
    wanted = Wanted.of(run.prompts, "sft", run.requests, run.config.generate.n, run.config.judge.k)
    lost = wanted.mark_completions(run.store, completions.shards(), run.gates, run.specs)
    return wanted, (lost, wanted.mark_judgements(run.store, judgements.shards(), run.judge_hash("full")))

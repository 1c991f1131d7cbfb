"""What would be found out hours later, checked before work on it begins. A mistake raises UserError that says what to change."""

from collections.abc import Iterable

from cluster.chat import chat_of
from cluster.engine import EngineConfig
from cluster.errors import UserError
from cluster.memory import require_free
from cluster.models import check_trainable
from cluster.pool import Pool
from cluster.session import cluster_gpus
from flows.workspace import Workspace
from tasks.compose import plain_turns
from tasks.progress import say
from tasks.prompts import Split, may_be_helped
from tasks.stage_config import StageConfig
from tasks.trackers import check_trackers


def check_data(run: Workspace) -> None:
    """Of the stages that make data. Raises UserError."""
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


def check_training(run: Workspace) -> None:
    """Of training and evaluation: prompts of the other splits, and room for them in the context. Raises UserError."""
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
        parts = {f"{name}.ranks": float(stage.ranks * stage.gpus_per_rank)}
        parts |= {place: pool.config.engines * pool.config.tensor_parallel * pool.config.gpus for place, pool in run.beside(name).items()}
        if stage.gpus_per_rank and sum(parts.values()) > total:
            raise UserError(
                f"{name}: needs {sum(parts.values()):g} GPUs at the same time ({_told(parts)}), the Ray cluster has {total:g}. Lower ranks "
                "or engines, or let engines share a GPU: `gpus` below 1 and a smaller `gpu_memory_utilization`."
            )


def check_memory(run: Workspace, draws: bool) -> None:
    """Of making data and, in the first round of a run that trains, of all that follows: raises UserError as `check_room` does.

    `draws`: whether completions are to be drawn, not judged alone.
    """
    config, drawing, judging = run.config, {"generate.engine": run.generator}, {"judge.engine": run.judge}
    later_rounds = run.trains and config.rounds > 1  # those have a generator apart
    if draws and config.judge.overlap and (run.judge is not run.generator or later_rounds):
        check_room(run, "generate and judge", drawing | judging)
    else:
        check_room(run, "generate", drawing if draws else {})
        check_room(run, "judge", judging)
    if run.trains and run.round == 1:
        for name in config.train:
            check_room(run, name, run.beside(name), run.ranks_gib(name))
        check_room(run, "evaluate", {"evaluate.engine": run.policy_engine} | judging)


def check_room(run: Workspace, moment: str, pools: dict[str, Pool], ranks_gib: float = 0.0) -> None:
    """Raises UserError when engines, by their place in the run file, and ranks that work on this machine's CPUs at the same time do not fit
    in its free memory. Engines that are there already have theirs."""
    parts = {place: pool.memory_gib for place, pool in pools.items() if not pool.started}
    if ranks_gib:
        parts[f"{moment}.ranks"] = ranks_gib
    require_free(sum(parts.values()), lambda free: f"{run.file}: {_too_much(moment, parts, free)}")


def _too_much(moment: str, parts: dict[str, float], free: float) -> str:
    ways = ["lower `engines` or `kv_cache_gib`", "take a smaller model"]
    if f"{moment}.ranks" in parts:
        ways.append("lower `ranks` or train adapters (`training.lora_rank`)")
    if moment == "generate and judge":
        ways.append("let generator and judge take turns (`judge.overlap: false`)")
    return (
        f"{moment}: needs about {sum(parts.values()):.1f} GiB at the same time ({_told(parts)}), {free:.1f} GiB are free. To make it "
        f"fit, {', or '.join(ways)}."
    )


def _told(parts: dict[str, float]) -> str:
    return ", ".join(f"{round(need, 2):g} for {place}" for place, need in parts.items() if need)

"""The command `specmill`."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.errors import SpecmillError

if TYPE_CHECKING:
    from flows.config import RunRequest

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
spec_app = typer.Typer(no_args_is_help=True, help="Check and show a policy bundle.")
app.add_typer(spec_app, name="spec")
prompts_app = typer.Typer(no_args_is_help=True, help="Check the prompts of a run.")
app.add_typer(prompts_app, name="prompts")

POLICY = "specs/policies/base"

RunFile = Annotated[str, typer.Argument(help="Run file, for example specs/runs/demo.yaml.")]
OtherRoot = Annotated[str | None, typer.Option(help="Take this root instead of the run file's.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a field: a.b=value. May be repeated.")]
Root = Annotated[str, typer.Argument(help="A root that runs write to.")]


@app.command()
def run(
    file: RunFile,
    flow: Annotated[Literal["factory", "regenerate", "train", "evaluate"], typer.Option(help="Which flow to run.")] = "factory",
    root: OtherRoot = None,
    set_: Changes = None,
) -> None:
    """Runs a flow on this machine, or on the Ray cluster and Prefect server that RAY_ADDRESS and PREFECT_API_URL name.

    Started again, the same command does only what is left: after Ctrl-C, after a crash, after a change of the policy.
    """
    from flows.config import RunRequest

    request = RunRequest(file=file, root=root, changes=set_ or [])

    def start() -> None:
        from flows.evaluate import evaluate
        from flows.factory import factory
        from flows.regenerate import regenerate
        from flows.train import train

        flows: dict[str, Callable[[RunRequest], object]] = {
            "factory": factory,
            "regenerate": regenerate,
            "train": train,
            "evaluate": evaluate,
        }
        flows[flow](request)

    _run(request, start, trains=flow != "regenerate")


def _run(request: "RunRequest", start: Callable[[], object], trains: bool, checked: Sequence["RunRequest"] = ()) -> None:
    """Checks everything, the requests `checked` too, then starts a flow.

    Prefect's environment is set before flows are imported, which is when it is read.
    """
    from flows.config import load_run
    from tasks.store import Store

    config = load_run(request)
    Store(config.root).check_writable()
    _prefect_environment(config.root)
    from flows.opening import prepare
    from tasks.progress import say

    for each in (*checked, request):
        prepare(each, trains=trains).check_keys()
    say("starting Prefect and Ray" if "PREFECT_API_URL" not in os.environ else "starting Ray")
    interrupted = threading.Event()
    try:
        with _ends_at_once(interrupted):
            start()
    except BaseException:
        if not interrupted.is_set():
            raise
        typer.echo("specmill: interrupted. Everything committed is kept; the same command goes on from there.", err=True)
        raise typer.Exit(130) from None


@app.command()
def sweep(
    file: RunFile,
    vary: Annotated[list[str], typer.Option(help="A field of SFT and its values: training.learning_rate=1e-5,1e-4. May be repeated.")],
    root: OtherRoot = None,
    set_: Changes = None,
) -> None:
    """Trains SFT with every combination of some settings and compares them on the split `dev`. What is there already is reused.

    Worth varying: training.learning_rate, rows, epochs, training.lora_rank, capability_ratio.
    """
    from flows.config import RunRequest, variants

    request = RunRequest(file=file, root=root, changes=[*(set_ or []), "train=[sft]"])
    checked = [request.model_copy(update={"changes": [*request.changes, *changes]}) for changes in variants("sft", vary)]

    def start() -> None:
        from flows.sweep import sweep as flow

        flow(request, vary)

    _run(request, start, trains=True, checked=checked)


@app.command()
def plan(
    file: RunFile,
    root: OtherRoot = None,
    set_: Changes = None,
) -> None:
    """Shows what a run would reuse, make and train, why, and its cost. Starts nothing, and writes only the prompts as it read them."""
    from flows.config import RunRequest
    from flows.opening import prepare
    from flows.plan import describe_plan
    from flows.plan import plan as make_plan

    workspace = prepare(RunRequest(file=file, root=root, changes=set_ or []), trains=False)
    typer.echo(describe_plan(*make_plan(workspace)))
    if workspace.config.rounds > 1:
        typer.echo(f"rounds 2 to {workspace.config.rounds}: not known yet, a checkpoint that is still to be trained completes the prompts")


@app.command()
def show(
    path: Annotated[str, typer.Argument(help="A run, dataset, checkpoint or evaluation directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Shows the manifest, the lineage and the funnel of something that Specmill wrote."""
    from flows.inspect import describe, read_manifest

    manifest = read_manifest(path)
    typer.echo(json.dumps(manifest, indent=1) if as_json else describe(path, manifest))


@app.command()
def verify(path: Annotated[str, typer.Argument(help="A root, or a run, dataset, checkpoint or evaluation directory.")]) -> None:
    """Checks checksums, keys and row balances; exits with 1 if anything is off."""
    from flows.inspect import problems

    found, checked = problems(path)
    for line in found:
        typer.echo(line, err=True)
    typer.echo(f"{checked} files checked, {len(found)} problems")
    if found:
        raise SpecmillError(f"{path} does not verify")


@app.command()
def replay(path: Annotated[str, typer.Argument(help="Directory of an RL checkpoint.")]) -> None:
    """Trains from an RL checkpoint's recorded rollouts alone, without an engine, and compares the steps; exits with 1 if they differ."""
    from flows.replay import replay as train_again

    steps = train_again(path)
    for step in steps:
        told = ", ".join(f"{name} {value:.9f}, replayed {step.found[name]:.9f}" for name, value in step.recorded.items())
        typer.echo(f"step {step.step}: {told}" + (f"  DIFFERS in {', '.join(step.differing)}" if step.differing else ""))
    if any(step.differing for step in steps):
        raise SpecmillError(f"{path}: its steps cannot be reproduced here; on another kind of processor sums are rounded otherwise.")


@app.command()
def gc(
    root: Root,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the files. Without it, they are only shown.")] = False,
    older_than: Annotated[float, typer.Option(min=0, help="Leave files alone that are younger than so many hours.")] = 24.0,
) -> None:
    """Shows, or removes, files that no ledger and no manifest names: of killed runs, superseded, half written."""
    from tasks.garbage import check_root, garbage
    from tasks.store import Store

    store, count, size = Store(root), 0, 0
    check_root(store)
    for file in garbage(store, 3600 * older_than):
        typer.echo(f"{file.bytes:>12,}  {file.age / 3600:8.1f} h  {file.path}")
        count, size = count + 1, size + file.bytes
        if delete:
            store.delete(file.path)
    typer.echo(f"{count} files, {size:,} bytes {'removed' if delete else 'that nothing names; --delete removes them'}")


@app.command()
def delete(
    root: Root,
    prompt: Annotated[str, typer.Option(help="Id of the prompt.")],
) -> None:
    """Takes a prompt, and all rows that came from it, out of a root for good. The next run makes a dataset version without it."""
    from tasks.garbage import check_root
    from tasks.store import Store
    from tasks.tombstones import delete_prompt

    store = Store(root)
    check_root(store)
    done = delete_prompt(store, prompt)
    typer.echo(f"{prompt}: " + (", ".join(f"{count} rows of {stage}" for stage, count in done.rows.items()) or "no rows") + " taken out")
    for holder in done.holders:
        typer.echo(f"  still holds it: {holder} (never changed; remove the folder when nothing needs it)")


@spec_app.command()
def lint(path: Annotated[str, typer.Argument(help="Policy bundle.")] = POLICY) -> None:
    """Checks a policy bundle; errors name file, category, clause and field."""
    from tasks.policy import lint as find
    from tasks.policy import load_policy

    policy = load_policy(path)
    for finding in find(policy):
        typer.echo(f"advice: {finding}")
    typer.echo(f"{path}: {len(policy.categories)} categories, {len(policy.clauses)} clauses, no errors")


@spec_app.command()
def render(
    category: Annotated[str, typer.Option(help="The category whose detail is shown.")],
    mode: Annotated[Literal["category", "full"], typer.Option(help="`category`: detail of one; `full`: of all.")] = "category",
    path: Annotated[str, typer.Argument(help="Policy bundle.")] = POLICY,
) -> None:
    """Prints spec(category), exactly as generator and judge read it."""
    from tasks.policy import load_policy
    from tasks.policy import render as render_spec

    typer.echo(render_spec(load_policy(path), category, mode).text)


@prompts_app.command()
def check(
    file: RunFile,
    root: OtherRoot = None,
    set_: Changes = None,
) -> None:
    """Reads the prompts of a run file: rows of each source, prompts by category and split, what was quarantined, what resembles what."""
    from flows.config import RunRequest, load_run
    from flows.prompt_check import describe_prompts
    from tasks.policy import load_policy
    from tasks.prompt_set import load_prompts
    from tasks.store import Store
    from tasks.tombstones import deleted_prompts

    config = load_run(RunRequest(file=file, root=root, changes=set_ or []))
    store = Store(config.root)
    store.check_writable()
    policy = load_policy(config.policy)
    typer.echo(describe_prompts(load_prompts(store, config.prompts, policy, config.overlap, deleted_prompts(store), config.cases)))


def main() -> None:
    """Entry point: one message and the right exit code for every failure, no traceback for a user's mistake."""
    try:
        app()
    except SpecmillError as error:
        typer.echo(f"specmill: {error}", err=True)
        sys.exit(error.exit_code)


@contextmanager
def _ends_at_once(interrupted: threading.Event) -> Iterator[None]:
    """Ctrl-C reaches the ephemeral Prefect server too, which ends first; without this its client would ask for it for minutes."""
    from prefect.settings import get_current_settings

    def stop(number: int, frame: object) -> None:
        interrupted.set()
        get_current_settings().client.max_retries = 0
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _prefect_environment(root: str) -> None:
    """An ephemeral Prefect keeps its files under the run's root and calls nobody; a server named by PREFECT_API_URL is used as it is."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    if "PREFECT_API_URL" not in os.environ:
        home = Path(root if "://" not in root else ".") / ".prefect"
        home.mkdir(parents=True, exist_ok=True)  # Prefect's server does not make it, and never says so
        os.environ.setdefault("PREFECT_HOME", str(home))
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_INTERNAL_LOGGING_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")


if __name__ == "__main__":
    main()

"""Looks at a model while it trains: what it answers, without guidance, to prompts that are in no reported set.

The look that is best by the configured measure is kept, unless the model has begun to refuse what it may help with: a learning rate alone
can do that, and the loss does not show it.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.fleet import Fleet
from cluster.training import agreed
from tasks.evaluate import answered, summarise
from tasks.policy import Policy
from tasks.prompts import Prompt
from tasks.rollout import DRAW, DrawShard, in_parts
from tasks.stage_config import DevelopmentConfig

if TYPE_CHECKING:
    from cluster.deepspeed_engine import TrainingEngine

MEASURES = ("verdict_accuracy", "policy_retrieval", "format_adherence", "over_refusal")


@dataclass(frozen=True)
class Development:
    """What a look needs."""

    config: DevelopmentConfig
    prompts: tuple[Prompt, ...]
    policy: Policy
    model_path: str
    engines: Fleet
    weights_file: str

    def look(self, engine: "TrainingEngine", version: int) -> dict[str, float]:
        """Shares of the prompts, by measure; those that no prompt counts for are left out. All ranks call it together."""
        engine.write_weights(self.weights_file, version)
        file = Path(self.weights_file).with_name(agreed(f"look-{uuid.uuid4().hex}.json"))
        if engine.rank == 0:
            file.with_suffix(".part").write_text(json.dumps(self._answered(version)))
            file.with_suffix(".part").rename(file)
        while not file.exists():  # a collective would time out while engines draw
            time.sleep(1)
        found: dict[str, float] = json.loads(file.read_text())
        agreed(None)
        if engine.rank == 0:
            file.unlink()
        return found

    def _answered(self, version: int) -> dict[str, float]:
        config = self.config
        self.engines.load_weights(self.weights_file, version)
        shards = [
            DrawShard(self.model_path, part, 1, config.max_tokens, config.temperature, config.seed)
            for part in in_parts(self.prompts, len(self.engines.actors))
        ]
        drawn = [answer for done in self.engines.map(DRAW, shards) for answer in done.result]
        by_id = {prompt.id: prompt for prompt in self.prompts}
        rates = summarise([answered(str(version), answer, by_id[answer.prompt_id], self.policy, []) for answer in drawn])
        return {name: rates[name]["value"] for name in MEASURES if rates[name]["total"]}


@dataclass
class Best:
    """The best look so far. `allowed`: the most over-refusal that is kept; `worse`: looks since then that were not better."""

    allowed: float
    step: int = 0
    value: float = -1.0
    worse: int = 0


class Watch:
    """Looks at the model every so many steps, and keeps the weights of the best look."""

    def __init__(self, development: Development, run: Path, state: dict[str, Any] | None) -> None:
        self._development, self._run = development, run
        self._best = Best(**state) if state else None
        self._before = self._best.step if self._best else 0
        """The best step when the checkpoint before was taken."""

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint remembers of it."""
        assert self._best
        return asdict(self._best)

    @property
    def kept(self) -> list[str]:
        """The folder with the weights of the best look, where there is one."""
        assert self._best
        return [self._kept(self._best.step).name] if self._best.step else []

    @property
    def over(self) -> bool:
        """Whether training has not got better for long enough."""
        return self._best is not None and self._best.worse >= self._development.config.patience

    def begin(self, engine: "TrainingEngine") -> dict[str, float]:
        """Looks at the model before its first step. All ranks call this and what follows together."""
        found = self._development.look(engine, 0)
        self._best = Best(found.get("over_refusal", 0.0) + self._development.config.over_refusal)
        return _named(found)

    def after(self, engine: "TrainingEngine", steps: int, total: int) -> dict[str, float]:
        """Measures after so many steps, if it is time for a look."""
        config, best = self._development.config, self._best
        assert best
        if steps % config.every_steps and steps != total:
            return {}
        found = self._development.look(engine, steps)
        if found[config.measure] > best.value and found.get("over_refusal", 0.0) <= best.allowed:
            engine.export(self._kept(steps))
            best.step, best.value, best.worse = steps, found[config.measure], 0
        else:
            best.worse += 1
        return _named(found) | {"development_best": best.step}

    def publish(self, engine: "TrainingEngine", output: Path, beside: Sequence[Path]) -> None:
        """Puts the best weights where they are expected. Raises UserError when over-refusal let none be kept."""
        assert self._best
        if not self._best.step:
            raise UserError(
                f"over-refusal on the development split was above {self._best.allowed:.2f} at every look, so no step is kept. Lower "
                "training.learning_rate, mix in more capability rows or benign prompts, or raise development.over_refusal."
            )
        kept = self._kept(self._best.step)
        if engine.rank == 0:
            # what is kept stays where it is: whoever dies from here on has it again
            work = output.with_name(f".{output.name}-{kept.name}")
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(kept, work, copy_function=os.link)
            for file in beside:
                shutil.copyfile(file, work / file.name)
            shutil.rmtree(output, ignore_errors=True)
            work.rename(output)
        agreed(None)

    def forget(self, engine: "TrainingEngine") -> None:
        """Removes the weights that neither this checkpoint nor the one before names: training may go back to either of them."""
        assert self._best
        needed = {self._kept(self._best.step), self._kept(self._before)}
        self._before = self._best.step
        for folder in self._run.glob(self._kept("*").name) if engine.rank == 0 else ():
            if folder not in needed:
                shutil.rmtree(folder)

    def _kept(self, steps: int | str) -> Path:
        """Where the weights of a look lie."""
        return self._run / f"best-{steps}"


def _named(found: dict[str, float]) -> dict[str, float]:
    return {f"development_{name}": value for name, value in found.items()}

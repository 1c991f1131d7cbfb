"""What a simulated driver opens: a workspace with prompts and policies, without models."""

import io
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.fleet import Fleet
from cluster.models import Model
from flows.workspace import Workspace
from simulation.object_store import Tablets
from simulation.world import LEASE, PROMPTS, Settings
from tasks import tables
from tasks.complete import GenerateConfig, Request
from tasks.gates import GateConfig, Gates
from tasks.judge import JudgeConfig
from tasks.keys import digest, request_prefix
from tasks.policy import Spec
from tasks.prompt_set import PromptSet
from tasks.store import Store

ROOT = "sim://root"
LIMIT = 3
"""Judge scores below it settle a completion."""


def specs(settings: Settings) -> dict[str, Spec]:
    """Category -> its policy as it is worded in this edition."""
    texts = {category: f"policy of {category}, edition {edition}" for category, edition in settings.editions}
    return {category: Spec(text, digest(text)) for category, text in texts.items()}


class Pool:
    """Engines that need no start."""

    started = True

    def __init__(self, id: str, engines: int) -> None:
        self.model = Model("no files", id, "1")
        self._fleet = Fleet([None] * engines, 4)

    def fleet(self) -> Fleet:
        return self._fleet

    def close(self) -> None:
        pass


class Run(Workspace):
    """A workspace without models."""

    @cached_property
    def requests(self) -> dict[str, Request]:
        found = {}
        for category, spec in specs(self.config.settings).items():
            model, sampling = self.generator.model, {"temperature": 1.0}
            prefix = request_prefix(spec=spec.hash, template="t", model=model.id, revision=model.revision, sampling=sampling)
            found[category] = Request(category, spec, model, prefix, "t", digest(sampling), None)
        return found

    @property
    def gates(self) -> Gates:
        return Gates(GateConfig(), frozenset(["VI1"]))

    @property
    def limits(self) -> dict[str, int]:
        return dict.fromkeys(PROMPTS, LIMIT)

    def judge_hash(self, view: str) -> str:
        return digest(["judge", view])

    def note(self, stage: str, **counts: int) -> None:
        self.notes[stage] = counts


def workspace(settings: Settings) -> Run:
    """What a driver opens."""
    generate, judge = GenerateConfig(n=settings.n, shard_rows=settings.shard_rows), JudgeConfig(k=settings.k, overlap=settings.overlap)
    config: Any = SimpleNamespace(settings=settings, generate=generate, judge=judge, lease_seconds=LEASE)
    store = Store(ROOT)
    pools: Any = [Pool("generator", settings.engines), Pool("judge", settings.engines)]
    return Run(config, None, prompt_set(store), store, *pools, None, trains=False)  # type: ignore[arg-type]


def prompt_set(store: Store) -> PromptSet:
    """The prompts that lie in every world's store."""
    parts = [{"path": f"{category}.parquet", "category": category, "rows": rows + 1, "splits": {"sft": rows, "rl": 1, "eval": 0}}
             for category, rows in PROMPTS.items()]  # fmt: skip
    return PromptSet(store, "prompts", {"parts": parts, "hash": "", "counts": {}})


@cache
def prompt_files(real: bool) -> dict[str, bytes]:
    """Path -> the file of a category's prompts, the last of which is of another split."""
    files = {}
    for category, rows in PROMPTS.items():
        names = [f"{category}-{number}" for number in range(rows + 1)]
        table = [
            {"id": name, "prompt_hash": digest(name), "category": category, "messages": [{"role": "user", "content": name}],
             "group": name, "split": "rl" if number == rows else "sft"}
            for number, name in enumerate(names)
        ]  # fmt: skip
        sink = io.BytesIO()
        (pq if real else Tablets).write_table(pa.Table.from_pylist(table, schema=tables.PROMPTS), sink)
        files[f"root/prompts/{category}.parquet"] = sink.getvalue()
    return files

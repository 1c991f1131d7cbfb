"""A dataset version: plain Parquet, a manifest that says what is in it and where it came from, and a card.

The training view carries no spec. A version exists when its manifest exists; its id is the hash of its rows and of where they came from.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.errors import SpecmillError
from tasks import tables
from tasks.keys import digest
from tasks.ledger import Ledger
from tasks.manifest import DATASET
from tasks.preferences import mean_scores, pairs
from tasks.prompt_set import PromptSet
from tasks.select import Candidates, SelectConfig, funnel, funnel_markdown, spare
from tasks.store import Shard, Store
from tasks.wanted import Wanted

FILE_ROWS = 16384
OPTIONAL = ("spare", "preferences")
"""Views that may be empty; then they have no file."""
COMPLETED = [
    "key", "category", "thought", "answer", "cited_verdict", "cited_clauses",
    "spec_hash", "template_hash", "generator", "generator_revision",
]  # fmt: skip

NOT_CALIBRATED = (
    "**The judge is not calibrated against human labels, and a 135M model shows that the machine runs, not that a model is safe.**"
)


@dataclass(frozen=True)
class Dataset:
    """A dataset version on disk."""

    name: str
    version: str
    path: str
    manifest: dict[str, Any]
    reused: bool

    def files(self, view: str) -> list[str]:
        """Parquet files of a view, relative to the root: `data`, `spare`, `preferences` or `audit`."""
        return [f"{self.path}/{file['path']}" for file in self.manifest["files"] if file["path"].startswith(f"{view}/")]


@dataclass(frozen=True)
class Selection:
    """What a round selected: the dataset, what a kept row costs with everything that was dropped for it, and on how many audited
    completions all runs of the judge agree to keep or to drop."""

    dataset: Dataset
    cost: dict[str, float]
    agreement: dict[str, float | int | None]


def candidates(wanted: Wanted) -> Candidates:
    """The completions of a run before the selection. Raises SpecmillError when one is not there."""
    absent = int((~wanted.made).sum())
    if absent:
        raise SpecmillError(f"completions: {len(wanted)} rows are wanted, {absent} of them are in no shard")
    return Candidates(
        wanted.categories, wanted.category, wanted.verdict, wanted.prompt, wanted.sample,
        wanted.scores, wanted.dropped.copy(), list(wanted.reasons),
    )  # fmt: skip


def publish(
    store: Store, name: str, prompts: PromptSet, wanted: Wanted, found: Candidates, config: SelectConfig, provenance: dict[str, Any]
) -> Dataset:
    """Writes a dataset version, manifest last; finds it again when the same rows were published before.

    Rows pass through memory file by file. Their order is that of the prompts and samples.
    """
    rows = _content(wanted, found)
    version = digest([rows, {key: value for key, value in provenance.items() if key != "code"}])[:12]
    path = f"datasets/{name}/{version}"
    versions = Ledger(store, f"datasets/{name}")
    known = store.read_json(f"{path}/manifest.json", DATASET)
    if known and all(store.exists(f"{path}/{file['path']}") for file in known["files"]):
        _register(versions, path, kept=known["rows"])
        return Dataset(name, version, path, known, reused=True)
    files: list[dict[str, Any]] = []
    verdicts: Counter[str] = Counter()
    rows_of: Counter[str] = Counter()
    for tables_of_file in _files(_views(store, prompts, wanted, found, config, provenance["judge"])):
        for folder, table in tables_of_file.items():
            rows_of[folder] += table.num_rows
            if not table.num_rows and folder in OPTIONAL:
                continue
            shard = asdict(store.put_table(f"{path}/{folder}", table))
            files.append(shard | {"path": shard["path"].removeprefix(f"{path}/")})
        audit = tables_of_file["audit"]
        verdicts.update(audit.filter(audit["kept"])["ideal_verdict"].to_pylist())
    kept, total = int(found.kept.sum()), len(wanted)
    manifest = {
        "version": 1,
        "kind": "dataset",
        "name": name,
        "id": version,
        "rows": kept,
        "spare": rows_of["spare"],
        "preferences": rows_of["preferences"],
        "files": files,
        "funnel": funnel(found),
        "prompt_set": prompts.path,
        "parent": _newest(versions),
        "balance": {"completions": total, "kept": kept, "dropped": total - kept},
        "provenance": provenance,
    }
    store.replace(f"{path}/README.md", _card(manifest, verdicts).encode())
    store.replace(f"{path}/manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
    _register(versions, path, kept)
    return Dataset(name, version, path, manifest, reused=False)


def _register(versions: Ledger, path: str, kept: int) -> None:
    """Makes a version the newest one in the ledger of the dataset's versions."""
    file = f"{path}/manifest.json"
    if _newest(versions) != path.rpartition("/")[2]:
        content = versions.store.read(file)
        versions.commit([Shard(file, len(content), hashlib.sha256(content).hexdigest(), rows=kept, quarantined=0)])


def _newest(versions: Ledger) -> str | None:
    """The version that was published last."""
    published = versions.shards()
    return published[-1].path.split("/")[-2] if published else None


def _content(wanted: Wanted, found: Candidates) -> str:
    """Hash of all rows and of what became of them."""
    content = hashlib.sha256()
    for _, _, index in wanted.by_part():
        content.update(wanted.keys[index].tobytes())
        content.update(found.scores[index].tobytes())
        content.update(wanted.content[index].tobytes())
        content.update("\n".join(found.reasons[number] or "kept" for number in found.reason[index]).encode())
    return content.hexdigest()


def _views(
    store: Store, prompts: PromptSet, wanted: Wanted, found: Candidates, config: SelectConfig, judge: dict[str, Any]
) -> Iterator[dict[str, pa.Table]]:
    """The views of every part of the prompts."""
    for part, rows, index in wanted.by_part():
        here = found.take(index)
        made = wanted.rows(store, index, COMPLETED)
        asked = store.read_table(part.path, ["id", "messages", "cell", "group", "ideal_verdict"]).take(rows)
        scores, score = here.scores, here.score
        starts = np.concatenate([[0], np.cumsum((scores > 0).sum(axis=1))]).astype(np.int32)
        kept = pa.array(here.kept)
        reasons = [found.reasons[number] for number in here.reason]
        same = {"prompt_id": asked["id"], "category": made["category"]}
        audit = same | {
            "key": made["key"],
            "cell": asked["cell"],
            "group": asked["group"],
            "split": _repeated("sft", len(index)),
            "ideal_verdict": asked["ideal_verdict"],
            "sample": pa.array(wanted.sample[index], pa.int32()),
            "cited_verdict": made["cited_verdict"],
            "cited_clauses": made["cited_clauses"],
            "score": pa.array(score, pa.int8(), mask=score == 0),
            "scores": pa.ListArray.from_arrays(pa.array(starts), pa.array(scores[scores > 0], pa.int8())),
            "spec_hash": made["spec_hash"],
            "template_hash": made["template_hash"],
            "generator": made["generator"],
            "generator_revision": made["generator_revision"],
            "judge": _repeated(judge["id"], len(index)),
            "judge_revision": _repeated(judge["revision"], len(index)),
            "kept": kept,
            "drop_reason": pa.array(reasons, pa.string()),
        }
        train = same | {"messages": asked["messages"], "thought": made["thought"], "answer": made["answer"]}
        training = pa.table([train[name] for name in tables.TRAINING_VIEW.names], schema=tables.TRAINING_VIEW)
        yield {
            "data": training.filter(kept),
            "spare": training.filter(pa.array(spare(here, config.spare))),
            "preferences": _preferences(training, made["key"], mean_scores(scores), *pairs(here, config.pairs)),
            "audit": pa.table([audit[name] for name in tables.AUDIT_VIEW.names], schema=tables.AUDIT_VIEW),
        }


def _preferences(
    rows: pa.Table,
    keys: pa.ChunkedArray,
    scores: npt.NDArray[np.float64],
    chosen: npt.NDArray[np.int64],
    rejected: npt.NDArray[np.int64],
) -> pa.Table:
    """The pairs among some completions."""
    rows = rows.append_column("key", keys).append_column("score", pa.array(scores, pa.float32()))
    sides = {"chosen": rows.take(chosen), "rejected": rows.take(rejected)}
    columns = {name: sides["chosen"][name] for name in ("prompt_id", "category", "messages")}
    columns |= {f"{side}_{name}": table[name] for side, table in sides.items() for name in ("thought", "answer", "score", "key")}
    return pa.table([columns[name] for name in tables.PREFERENCES.names], schema=tables.PREFERENCES)


def _files(views: Iterable[dict[str, pa.Table]]) -> Iterator[dict[str, pa.Table]]:
    """Joins the views of parts, so that a file has about `FILE_ROWS` completions."""
    waiting: list[dict[str, pa.Table]] = []
    for view in views:
        waiting.append(view)
        if sum(part["audit"].num_rows for part in waiting) >= FILE_ROWS:
            yield {name: pa.concat_tables([part[name] for part in waiting]) for name in view}
            waiting = []
    if waiting:
        yield {name: pa.concat_tables([part[name] for part in waiting]) for name in waiting[0]}


def _repeated(value: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.string()), count)


def _card(manifest: dict[str, Any], verdicts: Counter[str]) -> str:
    source = manifest["provenance"]
    mix = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    views = {"default": "data"} | {view: view for view in OPTIONAL if manifest[view]}
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {view}/*.parquet\n" for name, view in views.items()
    )
    return f"""---
configs:
{configs}---
{NOT_CALIBRATED}

# {manifest["name"]}@{manifest["id"]}

{manifest["rows"]} rows of (conversation, thought, answer) for deliberative alignment, without any policy text.
Ideal verdicts: {mix}.

- policy: {source["policy"]["id"]} ({source["policy"]["hash"][:12]})
- generator: {source["generator"]["id"]} @ {source["generator"]["revision"]}
- judge: {source["judge"]["id"]} @ {source["judge"]["revision"]}, k = {source["judge"]["k"]}, the minimum decides
- prompts: {source["prompts"]["rows"]} ({source["prompts"]["hash"][:12]}), {source["prompts"]["quarantined"]} quarantined

{funnel_markdown(manifest["funnel"])}

`data/` is the training view. `spare/` holds {manifest["spare"]} further rows that passed the threshold and were more than was wanted,
`preferences/` {manifest["preferences"]} pairs of completions of one prompt, the chosen one's mean score being higher.
`audit/` holds one row per completion with scores, hashes and the reason why it left.
`manifest.json` holds checksums.
Load it with `datasets.load_dataset("<this directory>")`.
"""

"""A dataset version: plain Parquet, a manifest that says what is in it and where it came from, and a card.

The training view carries no spec. A version exists when its manifest exists; its id is the hash of its rows and of where they came from.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from cluster.errors import SpecmillError
from tasks import tables
from tasks.gates import GateConfig, gate, spec_ngrams
from tasks.keys import digest
from tasks.policy import Policy, Spec
from tasks.prompts import Prompt, Split
from tasks.select import Candidate, funnel_markdown
from tasks.store import Shard, Store
from tasks.thoughts import cited_clauses, cited_verdict

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

    @property
    def training_files(self) -> list[str]:
        """Parquet files of the training view, relative to the root."""
        return [f"{self.path}/{file['path']}" for file in self.manifest["files"] if file["path"].startswith("data/")]


def gather(
    store: Store,
    shards: Iterable[Shard],
    wanted: dict[bytes, tuple[Prompt, int]],
    policy: Policy,
    specs: dict[str, Spec],
    config: GateConfig,
) -> tuple[list[dict[str, Any]], dict[bytes, str]]:
    """Reads the wanted completions and passes them through the gates.

    Returns rows with `source` (their shard) and the id that their prompt has now, and the drop reason of every row that a gate stops;
    a quarantined row's is `quarantined`. Raises SpecmillError when a wanted row is not there.
    """
    copied = {category: spec_ngrams(spec, config.max_copied_words + 1) for category, spec in specs.items()}
    rows: list[dict[str, Any]] = []
    dropped: dict[bytes, str] = {}
    left = set(wanted)
    for shard in shards:
        for row in store.read_table(shard.path).to_pylist():
            if row["key"] not in left:
                continue
            left.remove(row["key"])
            row |= {"source": shard.path, "prompt_id": wanted[row["key"]][0].id}
            rows.append(row)
            reason = "quarantined" if row["quarantined"] else gate(row, policy, copied[row["category"]], config)
            if reason:
                dropped[row["key"]] = reason
    if left:
        raise SpecmillError(f"completions: {len(wanted)} rows are wanted, {len(left)} of them are in no shard")
    order = {key: number for number, key in enumerate(wanted)}
    rows.sort(key=lambda row: order[row["key"]])  # whatever the order in which shards were finished
    return rows, dropped


def candidates(
    rows: Iterable[dict[str, Any]], dropped: dict[bytes, str], judgements: Iterable[dict[str, Any]], runs_wanted: int
) -> list[Candidate]:
    """Joins completions with their judge runs."""
    scores: dict[bytes, list[tuple[int, int]]] = {}
    for row in judgements:
        if row["score"] is not None:
            scores.setdefault(row["completion_key"], []).append((row["run"], row["score"]))
    found = []
    for row in rows:
        runs = tuple(score for _, score in sorted(scores.get(row["key"], [])))
        verdict = cited_verdict(row["thought"] or "")
        found.append(
            Candidate(
                row["key"],
                row["prompt_id"],
                row["category"],
                verdict,
                row["sample"],
                runs,
                runs_wanted,
                dropped.get(row["key"]),
            )
        )
    return found


def publish(
    store: Store,
    name: str,
    rows: list[dict[str, Any]],
    pool: list[Candidate],
    prompts: dict[str, Prompt],
    splits: dict[str, Split],
    provenance: dict[str, Any],
    funnel: dict[str, dict[str, int]],
) -> Dataset:
    """Writes a dataset version, manifest last; finds it again when the same rows were published before."""
    by_key = {row["key"]: row for row in rows}
    kept = sorted((c for c in pool if c.drop_reason is None), key=lambda c: (c.prompt_id, c.sample))
    train = [_training_row(by_key[c.key], prompts[c.prompt_id]) for c in kept]
    audit = [_audit_row(c, by_key[c.key], prompts[c.prompt_id], splits, provenance) for c in pool]
    named = [row | {"key": row["key"].hex()} for row in audit]
    version = digest([train, named, {key: value for key, value in provenance.items() if key != "code"}])[:12]
    path = f"datasets/{name}/{version}"
    known = store.read_json(f"{path}/manifest.json")
    if known and all(store.exists(f"{path}/{file['path']}") for file in known["files"]):
        return Dataset(name, version, path, known, reused=True)
    files = []
    for folder, table in (
        ("data", pa.Table.from_pylist(train, schema=tables.TRAINING_VIEW)),
        ("audit", pa.Table.from_pylist(audit, schema=tables.AUDIT_VIEW)),
    ):
        shard = asdict(store.put_table(f"{path}/{folder}", table))
        files.append(shard | {"path": shard["path"].removeprefix(f"{path}/")})
    manifest = {
        "version": 1,
        "kind": "dataset",
        "name": name,
        "id": version,
        "rows": len(train),
        "files": files,
        "funnel": funnel,
        "balance": {"completions": len(pool), "kept": len(train), "dropped": sum(c.drop_reason is not None for c in pool)},
        "provenance": provenance,
    }
    store.replace(f"{path}/README.md", _card(manifest, kept, prompts).encode())
    store.replace(f"{path}/manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
    return Dataset(name, version, path, manifest, reused=False)


def _training_row(row: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
    return {
        "prompt_id": prompt.id,
        "category": prompt.category,
        "messages": [message.model_dump() for message in prompt.messages],
        "thought": row["thought"],
        "answer": row["answer"],
    }


def _audit_row(
    candidate: Candidate, row: dict[str, Any], prompt: Prompt, splits: dict[str, Split], provenance: dict[str, Any]
) -> dict[str, Any]:
    thought = row["thought"] or ""
    return {
        "key": candidate.key,
        "prompt_id": prompt.id,
        "category": prompt.category,
        "cell": prompt.cell,
        "group": prompt.group,
        "split": splits[prompt.group],
        "ideal_verdict": prompt.ideal_verdict,
        "sample": candidate.sample,
        "cited_verdict": cited_verdict(thought),
        "cited_clauses": cited_clauses(thought),
        "score": candidate.score,
        "scores": list(candidate.scores),
        "spec_hash": row["spec_hash"],
        "template_hash": row["template_hash"],
        "generator": row["generator"],
        "generator_revision": row["generator_revision"],
        "judge": provenance["judge"]["id"],
        "judge_revision": provenance["judge"]["revision"],
        "kept": candidate.drop_reason is None,
        "drop_reason": candidate.drop_reason,
    }


def _card(manifest: dict[str, Any], kept: list[Candidate], prompts: dict[str, Prompt]) -> str:
    source = manifest["provenance"]
    verdicts = Counter(prompts[c.prompt_id].ideal_verdict for c in kept)
    mix = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---
{NOT_CALIBRATED}

# {manifest["name"]}@{manifest["id"]}

{manifest["rows"]} rows of (conversation, thought, answer) for deliberative alignment, without any policy text.
Ideal verdicts: {mix}.

- policy: {source["policy"]["id"]} ({source["policy"]["hash"][:12]})
- generator: {source["generator"]["id"]} @ {source["generator"]["revision"]}
- judge: {source["judge"]["id"]} @ {source["judge"]["revision"]}, k = {source["judge"]["k"]}, the minimum decides
- prompts: {source["prompts"]["rows"]} ({source["prompts"]["hash"][:12]}), {source["prompts"]["quarantined"]} quarantined

{funnel_markdown(manifest["funnel"])}

`data/` is the training view. `audit/` holds one row per completion with scores, hashes and the reason why it left.
`manifest.json` holds checksums.
Load it with `datasets.load_dataset("<this directory>")`.
"""

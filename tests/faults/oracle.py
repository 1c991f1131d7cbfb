"""What must hold in a simulated world, told from its objects alone: nothing here asks the ledger, the marks or the keys under test."""

import hashlib
import io
import json
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from simulation.engines import said
from simulation.run import LIMIT, specs, workspace
from simulation.world import DRIFT, PROMPTS, Settings, World

import tasks.store
from flows.workspace import survey
from tasks.judge import audited
from tasks.keys import digest
from tasks.keyset import keys_of
from tasks.ledger import Ledger

STAGES = ("completions", "judgements")


class Oracle:
    """Watches every entry as it appears and judges what is there when all is over."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.on_entry = self.entry_appears
        self._tables: dict[str, list[dict[str, Any]]] = {}

    def blame(self, text: str) -> None:
        """Notes a promise that was broken."""
        self.world.note(f"VIOLATION {text}")
        self.world.violations.append(text)

    def entries(self, stage: str) -> list[dict[str, Any]]:
        """The entries of a ledger by their numbers, as far as they go without a gap."""
        found: list[dict[str, Any]] = []
        while (content := self.world.objects.get(f"root/{stage}/ledger/{len(found):08d}.json")) is not None:
            found.append(json.loads(content))
        return found

    def entry_appears(self, path: str, content: bytes) -> None:
        """An entry may name what is there, follow the last one, and end the turn of a writer only when that one is dead."""
        world, name = self.world, path.rpartition("/")[2]
        if name.startswith("snapshot"):
            return
        entry, number = json.loads(content), int(name.removesuffix(".json"))
        for shard in entry["shards"]:
            place = f"root/{shard['path']}"
            if place not in world.objects and place not in world.damaged:
                self.blame(f"{path} names {shard['path']}, which was never written")
        if not number:
            return
        before = f"{path.rpartition('/')[0]}/{number - 1:08d}.json"
        if before not in world.objects:
            self.blame(f"{path} follows no entry")
            return
        last = json.loads(world.objects[before])
        if last["ended"] or last["writer"] == entry["writer"]:
            return
        if world.now - world.born[before] < last["lease"] * (1 - 2 * DRIFT):
            self.blame(f"{path}: {entry['writer']} did not wait for the lease of {last['writer']}")
        loser = world.writers[last["writer"]]
        if not (loser.dead or loser.ended or loser.disturbed):
            self.blame(f"{path}: {entry['writer']} took {last['writer']} for dead, which was well")

    def rows(self, path: str) -> list[dict[str, Any]]:
        """The rows of a shard as it was written."""
        if path not in self._tables:
            content = self.world.pristine.get(f"root/{path}")
            source = io.BytesIO(content) if content else None
            self._tables[path] = tasks.store.pq.ParquetFile(source).read(None, use_threads=False).to_pylist() if source else []
        return self._tables[path]

    def live(self, stage: str) -> dict[str, dict[str, Any]]:
        """Shards that count, in the order of their entries."""
        shards: dict[str, dict[str, Any]] = {}
        for entry in self.entries(stage):
            for shard in entry["shards"]:
                if shards.pop(shard["path"], None) and stage == "completions":
                    self.blame(f"{shard['path']} is named twice")
                shards[shard["path"]] = shard
            for path in entry["lost"]:
                if f"root/{path}" not in self.world.damaged:
                    self.blame(f"{path} is declared lost, but was not")
                shards.pop(path, None)
        return shards

    def wanted(self, settings: Settings) -> set[tuple[str, int, str]]:
        """(prompt, sample, spec) of everything that a run with these settings wants."""
        hashes = {category: spec.hash for category, spec in specs(settings).items()}
        names = [(f"{category}-{number}", hashes[category]) for category, rows in PROMPTS.items() for number in range(rows)]
        return {(name, sample, spec) for name, spec in names for sample in range(settings.n)}

    def check_done(self, settings: Settings, who: str) -> None:
        """A driver says that it is done: all it wants has been committed, whatever was lost since."""
        named = {shard["path"] for entry in self.entries("completions") for shard in entry["shards"]}
        made = {(row["prompt_id"], row["sample"], row["spec_hash"]) for path in named for row in self.rows(path)}
        if missing := self.wanted(settings) - made:
            self.blame(f"{who} says it is done, {len(missing)} completions are not committed")

    def check_end(self, settings: Settings) -> None:
        """Everything holds: numbers, bytes, balances, the multiset of what was wanted, and how judgements belong to completions."""
        shards = {stage: self.live(stage) for stage in STAGES}
        for stage in STAGES:
            self._check_ledger(stage, shards[stage])
        completions = [row for path in shards["completions"] for row in self.rows(path)]
        judgements = [row for path in shards["judgements"] for row in self.rows(path)]
        counts = Counter((row["prompt_id"], row["sample"], row["spec_hash"]) for row in completions)
        wanted = self.wanted(settings)
        if wrong := {name: counts[name] for name in wanted if counts[name] != 1}:
            self.blame(f"completions that are not there once: {wrong}")
        if doubled := [name for name, count in counts.items() if count > 1]:
            self.blame(f"completions that were made twice: {doubled}")
        texts = {spec.hash: spec.text for edition in range(1, 6) for spec in specs(_of_edition(edition)).values()}
        for row in completions:
            if row["thought"] and row["thought"].split("\n")[0] != f"{texts[row['spec_hash']]} on {row['prompt_id']}":
                self.blame(f"{row['prompt_id']} sample {row['sample']} was made under another policy or for another prompt")
        if len({row["key"] for row in completions}) != len(completions):
            self.blame("two completions have one key")
        counting = {row["key"]: row for row in completions if (row["prompt_id"], row["sample"], row["spec_hash"]) in wanted}
        self._check_marks(settings, counting, self._check_judgements(settings, counting, judgements))

    def _check_ledger(self, stage: str, live: dict[str, dict[str, Any]]) -> None:
        world, entries = self.world, self.entries(stage)
        names = [path.rpartition("/")[2] for path in world.objects if path.startswith(f"root/{stage}/ledger/")]
        if len([name for name in names if not name.startswith("snapshot")]) != len(entries):
            self.blame(f"{stage}: the ledger has a gap")
        for path, shard in live.items():
            content = world.objects.get(f"root/{path}", b"")
            if hashlib.sha256(content).hexdigest() != shard["sha256"] or len(content) != shard["bytes"]:
                self.blame(f"{path} counts, but its bytes are not there")
            rows = self.rows(path)
            if len(rows) != shard["rows"] or sum(row["quarantined"] is not None for row in rows) != shard["quarantined"]:
                self.blame(f"{path}: rows do not balance")
        state = Ledger(workspace(Settings()).store, stage).read()
        made = sum(shard["rows"] for entry in entries if entry["usage"]["requests"] for shard in entry["shards"])
        cost = sum(entry["usage"]["requests"] for entry in entries)
        if (state.entries, list(state.shards), state.made, state.usage.requests) != (len(entries), list(live), made, cost):
            self.blame(f"{stage}: the ledger is not read as it was written")

    def _check_judgements(
        self, settings: Settings, counting: dict[bytes, dict[str, Any]], judgements: list[dict[str, Any]]
    ) -> dict[bytes, dict[int, int | None]]:
        """Completion -> run -> score, the last of each run."""
        scores: dict[bytes, dict[int, int | None]] = defaultdict(dict)
        named = [shard["path"] for entry in self.entries("completions") for shard in entry["shards"]]
        counted = Counter((row["key"], row["content"]) for path in named for row in self.rows(path))
        for (key, content, run), count in Counter((row["completion_key"], row["content"], row["run"]) for row in judgements).items():
            if count > counted[key, content]:  # one that was lost, and says the same when it is drawn again, is judged again
                self.blame(f"run {run} of a completion that counted {counted[key, content]} times was judged {count} times")
        for row in judgements:
            completion = counting.get(row["completion_key"])
            if completion is None or row["content"] != completion["content"]:
                continue
            if row["raw"] and row["raw"] != [said(completion)]:
                self.blame(f"a judge of {row['prompt_id']} did not read what it judges")
            if row["run"] < settings.k:
                scores[row["completion_key"]][row["run"]] = row["score"]
        config = workspace(settings).config.judge
        for key, completion in counting.items():
            runs = scores[key]
            settled = any(score is not None and score < LIMIT for score in runs.values()) and not audited(keys_of([key]), config)[0]
            if completion["drop_reason"] is None and len(runs) < settings.k and not settled:
                self.blame(f"{completion['prompt_id']} sample {completion['sample']} is judged {len(runs)} times of {settings.k}")
        return scores

    def _check_marks(self, settings: Settings, counting: dict[bytes, dict[str, Any]], scores: dict[bytes, dict[int, int | None]]) -> None:
        """The next run sees the same."""
        run = workspace(settings)
        wanted, lost = survey(run, Ledger(run.store, STAGES[0]), Ledger(run.store, STAGES[1]))
        keys = [bytes(key).ljust(16, b"\0") for key in wanted.keys]
        if lost != ([], []) or set(keys) != set(counting) or not wanted.made.all():
            self.blame("what is committed is not what the next run wants")
            return
        rows = wanted.rows(run.store, np.arange(len(wanted)), ["key", "thought", "answer"]).to_pylist()
        expected = [(key, digest([counting[key]["thought"], counting[key]["answer"]])) for key in keys]
        if [(row["key"], said(row)) for row in rows] != expected:
            self.blame("the next run sees other completions than the ones that count")
        for number, key in enumerate(keys):
            seen = {run: int(score) for run, score in enumerate(wanted.scores[number]) if score}
            if seen != {run: -1 if score is None else score for run, score in scores[key].items()}:
                self.blame(f"the next run sees other scores: {seen} instead of {scores[key]}")


def _of_edition(edition: int) -> Settings:
    return Settings(editions=tuple((category, edition) for category in PROMPTS))

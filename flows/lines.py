"""Drawing and judging, the two lines of a run: what each has to do, who may write its ledger, and what became of it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from cluster.fleet import Done, Line
from cluster.pool import Pool
from flows.workspace import Workspace, survey
from tasks import complete, judge
from tasks.complete import CompletionShard
from tasks.ledger import Ledger
from tasks.progress import Progress
from tasks.wanted import Wanted
from tasks.work import Pairs, Receipt, Tally, work


class Lines:
    """The line that draws completions and the one that judges them, k times each; what a ledger holds is on neither."""

    def __init__(self, run: Workspace, drawn: Progress, judged: Progress) -> None:
        self.run = run
        completions, judgements = Ledger(run.store, complete.STAGE), Ledger(run.store, judge.STAGE)
        wanted, lost = survey(run, completions, judgements)
        self.drawing, self.judging = Line(complete.COMPLETE, run.generator.fleet), Line(judge.JUDGE, run.judge.fleet)
        self.drawn, self.judged = Tally(completions, drawn, lost[0]), Tally(judgements, judged, lost[1])
        self.lost = tuple(map(len, lost))
        self.reused, self.gated = int(wanted.made.sum()), int((wanted.made & ~wanted.passed).sum())
        self.passed = self.reused - self.gated
        self._plan(wanted)

    def _plan(self, wanted: Wanted) -> None:
        run = self.run
        for part, pairs in wanted.missing_completions():
            shard = CompletionShard(
                run.store.root, run.generator.model, run.config.generate, run.requests[part.category], run.gates, part.path, pairs
            )
            self.drawn.add(self.drawing, [replace(shard, pairs=piece) for piece in pairs.pieces(run.config.generate.shard_rows)])
        missing = wanted.missing_runs(run.config.judge, run.limits)
        self.settled = int(wanted.settled_runs(missing).sum())
        for source, category, pairs in wanted.judgements_to_make(missing):
            self.judged.add(self.judging, [run.judgement_shard(source, category, pairs)])

    @property
    def waiting(self) -> bool:
        """Whether there is something to draw or to judge."""
        return bool(self.drawing.waiting or self.judging.waiting)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Claims the ledger of each line that has, or will have, something to write."""
        with ExitStack() as claims:
            for line, tally in ((self.judging, self.judged), (self.drawing, self.drawn)):
                if line.waiting or self.drawing.waiting or tally.lost:
                    claims.enter_context(tally.ledger.writing(self.run.config.lease_seconds))
            yield

    def work_together(self) -> None:
        """Judges a finished shard while the next ones are drawn, on the same engines or on others."""
        run = self.run
        run.start(run.generator, needed=bool(self.drawing.waiting))
        run.start(run.judge, needed=bool(self.judging.waiting or self.drawing.waiting))
        wall = work({self.judging: self.judged, self.drawing: self.drawn}, self._follow)  # what is drawn is judged before more is drawn
        if run.judge is run.generator:
            run.tell_speed(run.generator, wall, {"complete": self.drawn, "judge": self.judged})
        else:
            run.tell_speed(run.generator, wall, {"complete": self.drawn})
            run.tell_speed(run.judge, wall, {"judge": self.judged})

    def work_in_turn(self) -> None:
        """Draws everything, gives the memory of the generator's engines back, and judges."""
        for stage, line, tally, pool in self._turns():
            self.run.start(pool, needed=bool(line.waiting))
            self.run.tell_speed(pool, work({line: tally}, self._follow), {stage: tally})
            pool.close()

    def _turns(self) -> list[tuple[str, Line, Tally, Pool]]:
        return [("complete", self.drawing, self.drawn, self.run.generator), ("judge", self.judging, self.judged, self.run.judge)]

    def _follow(self, done: Done) -> None:
        """Completions that were drawn and passed the gates are to be judged."""
        if done.line is self.drawing:
            receipt: Receipt = done.result
            self.passed += len(receipt.passed)
            self.gated += receipt.file.rows - len(receipt.passed)
            if receipt.passed:
                pairs = Pairs.product(receipt.passed, self.run.config.judge.k)
                self.judged.add(self.judging, [self.run.judgement_shard(receipt.file, done.shard.request.category, pairs)])

    def balance(self) -> None:
        """Raises SpecmillError when a line made less than it was asked for."""
        self.drawn.balance()
        self.judged.balance()

    def note(self) -> None:
        """Tells what was wanted, reused and made."""
        drawn, judged = self.drawn, self.judged
        lost_completions, lost_judgements = self.lost
        self.run.note(
            self.run.label("complete"), wanted=self.reused + drawn.made, reused=self.reused, made=drawn.made, lost_shards=lost_completions
        )
        verdicts = self.passed * self.run.config.judge.k
        self.run.note(
            self.run.label("judge"),
            wanted=verdicts,
            reused=verdicts - judged.asked - self.settled,
            made=judged.made,
            skipped=judged.skipped + self.settled,
            gated=self.gated,
            lost_shards=lost_judgements,
        )

"""Where the time of RL's steps goes: the shares of rollout, judge, training and weight transfer, and what lies outside of them.

Reads the log of an RL checkpoint, for example the one that `make demo` leaves. Outside of these are the checkpoint of the training's
state and, in the last step, the measurement of the KL to where RL began, which have lines of their own. The first step is left out: it
waits for what is loaded once.

    python tests/benchmarks/rl_step.py out/checkpoints/rl-*
"""

import argparse
import json
import sys
from pathlib import Path

from report import head, row

from tasks.plots import PHASES

LIMIT = 5.0
"""Percent of the time of the steps that may lie outside of the phases."""


def main(checkpoint: str) -> None:
    log = Path(checkpoint) / "metrics.jsonl"
    if not log.exists():
        sys.exit(f"{log}: no such file; give the directory of an RL checkpoint.")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    if len(lines) < 2:
        sys.exit(f"{checkpoint}: has one step, and the first one is not counted.")
    steps = lines[1:]
    whole = sum(line["step_seconds"] for line in steps)
    head()
    for phase in (*PHASES, "checkpoint_seconds", "forward_kl_seconds"):
        shares = [100 * line.get(phase, 0.0) / line["step_seconds"] for line in steps]
        share = 100 * sum(line.get(phase, 0.0) for line in steps) / whole
        row(
            f"{phase.removesuffix('_seconds')}, % of the time",
            f"{share:.1f}",
            f"{min(shares):.1f} to {max(shares):.1f} in {len(steps)} steps",
        )
    known = sum(line.get(phase, 0.0) for line in steps for phase in PHASES)
    row("outside of the first four, % of the time", f"{100 * (1 - known / whole):.1f}", f"of {whole:.0f} s", f"{LIMIT:g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the directory of an RL checkpoint")
    main(parser.parse_args().checkpoint)

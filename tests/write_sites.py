"""Every kind of durable write that a run makes. In the windows before and after each of them something is killed by a test."""

from pathlib import Path

WINDOWS = Path(__file__).parent / "faults" / "windows"
"""On the path of a Python process it makes durable writes known, or deadly."""
FOLDERS = ("todo", "done", "seen", "actors", "deaths", "killed")
"""What it works with; see there."""
DATA_SITES = {
    "create probe", "delete probe",
    "create prompts part", "create prompts capability", "create prompts quarantined", "replace prompts manifest",
    "create completions shard", "create completions entry", "create completions snapshot",
    "create judgements shard", "create judgements entry", "create judgements snapshot",
    "create datasets entry", "create datasets data", "create datasets audit", "create datasets spare", "create datasets preferences",
    "replace datasets card", "replace datasets manifest",
}  # fmt: skip
"""Every durable write of the data stages."""
FINAL_SITES = {
    "create checkpoints entry", "create rows shard", "replace checkpoints manifest",
    "create evaluations entry", "create evaluations shard", "create evaluations manifest",
    "replace runs plot", "replace runs report", "replace runs manifest",
}  # fmt: skip
"""Those that follow, but for RL's rollouts."""
ROLLOUT_SITES = {"create rollouts shard", "create rollouts entry"}
"""Those of a rank that has rollouts drawn."""

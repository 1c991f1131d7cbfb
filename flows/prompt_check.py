"""`specmill prompts check`: what became of the rows of a run's sources."""

from collections import Counter

from flows.terminal import aligned
from tasks.prompt_set import PromptSet
from tasks.prompts import SPLIT_SHARES


def describe_prompts(prompts: PromptSet) -> str:
    """Rows by source, prompts by category and split, what was quarantined and why, and what resembles what."""
    manifest = prompts.manifest
    kinds = ["rows", "prompts", "capability", "quarantined"]
    sources = [[source["file"], *(str(source[kind]) for kind in kinds)] for source in manifest["sources"]]
    total = ["all", *(str(sum(source[kind] for source in manifest["sources"])) for kind in kinds)]
    lines = aligned([["source", *kinds], *sources, total])
    lines += [
        f"{source['file']}: left out {', '.join(f'{count} {what}' for what, count in source['left_out'].items())}"
        for source in manifest["sources"]
        if source["left_out"]
    ]
    splits: dict[str, Counter[str]] = {}
    for part in prompts.parts:
        splits.setdefault(part.category, Counter()).update(part.splits)
    counted = [[category, *(str(found[split]) for split in SPLIT_SHARES)] for category, found in splits.items()]
    lines += ["", *aligned([["category", *SPLIT_SHARES], *counted, ["all", *(str(prompts.size(split)) for split in SPLIT_SHARES)]])]
    if manifest["reasons"]:
        reasons = [[field, str(found["rows"]), found["first"]] for field, found in manifest["reasons"].items()]
        lines += ["", *aligned([["quarantined for", "rows", "the first"], *reasons])]
    overlap = manifest["overlap"]
    found = f"{overlap['near_duplicates']} near-duplicates, {overlap['contaminated']} rows like evaluation prompts"
    lines += ["", f"{found}, {overlap['dropped']} dropped"]
    lines += [
        f"benchmark {file['file']}: {file['rows']} rows"
        + f", {file['unusable']} unusable ({file['first_reason']})" * bool(file["unusable"])
        for file in overlap["benchmarks"]
    ]
    lines += [
        f"  {row['kind']}: {row['file']}:{row['line']} {row['id']!r} is {row['similarity']:.2f} like {row['resembles']!r} ({row['at']})"
        for row in overlap["examples"]
    ]
    lines += ["", f"all of them: {prompts.store.path(prompts.path)}/"]
    return "\n".join(lines)

"""The written policy ("the spec"): its format, its checks, and how it is rendered around a request.

A policy bundle is a directory: `bundle.yaml` (principles and general style) and one YAML file per category. What the model reads is
`render(policy, category)`: summaries of all categories, the principles, and the full detail of the category at hand (Guan et al.,
arXiv 2412.16339, section 2.3.1). The hash of that text, not of the files, is what a request's key depends on.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from cluster.errors import UserError
from tasks.validation import Strict, name_of, parse, read_yaml

Verdict = Literal["comply", "refuse", "safe_complete"]
VERDICTS: tuple[Verdict, ...] = ("comply", "refuse", "safe_complete")
RenderMode = Literal["category", "full"]

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
ClauseId = Annotated[str, StringConstraints(pattern=r"^[A-Z]{1,6}[0-9]{1,3}$")]
CategoryId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{1,40}$")]


class Case(Strict):
    """An illustration of a clause: what a user might write, and why the clause decides it."""

    prompt: Text
    note: Text


class Clause(Strict):
    """One rule: when it applies and the verdict. What falls under a clause named in `excludes` is decided there."""

    id: ClauseId
    verdict: Verdict
    text: Text
    excludes: tuple[ClauseId, ...] = ()
    generate: Literal["always", "never"] = "always"
    rationale: Text | None = None
    cases: tuple[Case, ...] = ()


class Definition(Strict):
    """A term that the clauses use."""

    term: Text
    text: Text


class Principle(Strict):
    """A rule that holds for every category."""

    id: ClauseId
    text: Text


class Style(Strict):
    """How an answer of each verdict is written."""

    refuse: tuple[Text, ...] = ()
    comply: tuple[Text, ...] = ()
    safe_complete: tuple[Text, ...] = ()


class Category(Strict):
    """One area of the policy."""

    version: Literal[1]
    id: CategoryId
    title: Text
    summary: Text
    definitions: tuple[Definition, ...] = ()
    style: Style = Style()
    clauses: tuple[Clause, ...] = Field(min_length=1)


class BundleFile(Strict):
    """`bundle.yaml`: what all categories share, and which categories there are."""

    version: Literal[1]
    id: CategoryId
    title: Text
    categories: tuple[CategoryId, ...] = Field(min_length=1, max_length=255)
    principles: tuple[Principle, ...] = Field(min_length=1)
    style: Style

    @model_validator(mode="after")
    def _names_each_once(self) -> "BundleFile":
        for field, names in (("categories", self.categories), ("principles", [principle.id for principle in self.principles])):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{field}: {', '.join(twice)} more than once")
        return self


@dataclass(frozen=True)
class Policy:
    """A checked policy bundle."""

    bundle: BundleFile
    categories: dict[str, Category]

    @cached_property
    def clauses(self) -> dict[str, tuple[Category, Clause]]:
        """Clause id -> its category and the clause."""
        return {clause.id: (category, clause) for category in self.categories.values() for clause in category.clauses}

    @property
    def principles(self) -> dict[str, Principle]:
        """Id -> principle."""
        return {principle.id: principle for principle in self.bundle.principles}


@dataclass(frozen=True)
class Spec:
    """A rendered policy: the text that a model reads, and its sha256 in hexadecimal."""

    text: str
    hash: str


def load_policy(directory: Path | str) -> Policy:
    """Reads and checks a bundle. Raises UserError with one line per problem: file, category, clause and field."""
    root = Path(directory)
    bundle_path = root / "bundle.yaml"
    bundle = parse(BundleFile, read_yaml(bundle_path), bundle_path)
    categories: dict[str, Category] = {}
    problems: list[str] = []
    for name in bundle.categories:
        path = root / f"{name}.yaml"
        try:
            content = read_yaml(path)
            category = parse(Category, content, path, partial(_place, content, name))
        except UserError as error:
            problems.append(str(error))
            continue
        if category.id != name:
            problems.append(f"{path}: id: is {category.id!r}, but bundle.yaml lists this file as {name!r}")
        categories[name] = category
    problems += _cross_checks(root, bundle, categories)
    if problems:
        raise UserError("\n".join(problems))
    return Policy(bundle, categories)


def render(policy: Policy, category: str, mode: RenderMode = "category") -> Spec:
    """spec(category): summaries of all categories, principles, style, and the detail of `category` (`full`: of every category)."""
    if category not in policy.categories:
        raise UserError(f"unknown category {category!r}; this policy has {', '.join(policy.categories)}.")
    bundle = policy.bundle
    lines = [f"# Policy: {bundle.title}", "", "## Principles"]
    lines += [f"{principle.id}. {principle.text}" for principle in bundle.principles]
    lines += ["", "## Style of an answer", *_style(bundle.style)]
    lines += ["", "## Categories in brief"]
    lines += [f"- {item.id}: {item.summary}" for item in policy.categories.values()]
    detailed = policy.categories.values() if mode == "full" else [policy.categories[category]]
    for item in detailed:
        lines += ["", f"## Category in full: {item.id}", "Terms:"]
        lines += [f"- {definition.term}: {definition.text}" for definition in item.definitions]
        lines += ["Clauses:", *(_clause(clause) for clause in item.clauses)]
        lines += _style(item.style)
    text = "\n".join(" ".join(line.split()) if line else "" for line in lines)
    return Spec(text, hashlib.sha256(text.encode()).hexdigest())


def lint(policy: Policy) -> list[str]:
    """Advice on a valid policy: what a reviewer would ask for. One line per finding, empty when there is none."""
    findings = []
    for category in policy.categories.values():
        where = f"category {category.id}"
        missing = [verdict for verdict in VERDICTS if all(clause.verdict != verdict for clause in category.clauses)]
        if missing:
            findings.append(f"{where}: no clause with verdict {', '.join(missing)}")
        if sum(len(clause.excludes) for clause in category.clauses) < 3:
            findings.append(f"{where}: fewer than 3 exclusions; neighbouring clauses probably overlap")
        for clause in category.clauses:
            if len(clause.cases) < 2:
                findings.append(f"{where}: clause {clause.id}: fewer than 2 cases")
            if clause.rationale is None:
                findings.append(f"{where}: clause {clause.id}: no rationale")
    return findings


def _style(style: Style) -> list[str]:
    return [f"{verdict}: {' '.join(points)}" for verdict in VERDICTS if (points := getattr(style, verdict))]


def _clause(clause: Clause) -> str:
    excludes = f" (excludes {', '.join(clause.excludes)})" if clause.excludes else ""
    return f"- {clause.id} [{clause.verdict}] {clause.text}{excludes}"


def _place(content: dict[str, Any], category: str, location: tuple) -> str:
    """`('clauses', 3, 'verdict')` -> `category self-harm: clause SH4: verdict`."""
    parts = [f"category {category}"]
    rest = list(location)
    if len(rest) >= 2 and rest[0] == "clauses" and isinstance(rest[1], int):
        clause = content["clauses"][rest[1]]
        name = clause.get("id") if isinstance(clause, dict) else None
        parts.append(f"clause {name_of(name) if name else 'number ' + str(rest[1] + 1)}")
        rest = rest[2:]
    parts.append(".".join(map(name_of, rest)))
    return ": ".join(part for part in parts if part)


def _cross_checks(root: Path, bundle: BundleFile, categories: dict[str, Category]) -> list[str]:
    problems = []
    home: dict[str, str] = {}
    principles = {principle.id for principle in bundle.principles}
    edges: dict[str, tuple[str, ...]] = {}
    for category in categories.values():
        for clause in category.clauses:
            where = f"{root / category.id}.yaml: category {category.id}: clause {clause.id}"
            if clause.id in home:
                problems.append(f"{where}: id: also used in category {home[clause.id]}")
            if clause.id in principles:
                problems.append(f"{where}: id: also that of a principle in bundle.yaml")
            if clause.generate == "never" and clause.verdict != "refuse":
                problems.append(f"{where}: generate: `never` needs the verdict refuse, found {clause.verdict}")
            home[clause.id] = category.id
            edges[clause.id] = clause.excludes
    for name, excludes in edges.items():
        for other in excludes:
            if other not in edges:
                problems.append(f"{root / home[name]}.yaml: category {home[name]}: clause {name}: excludes: no clause {other}")
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        cycle = error.args[1][::-1]
        first = cycle[0]
        problems.append(
            f"{root / home[first]}.yaml: category {home[first]}: clause {first}: excludes: cycle {' -> '.join(cycle)}; "
            "one of these clauses has to decide"
        )
    return problems

"""What `manifest.json` holds: a prompt set, dataset, checkpoint, evaluation or run exists when its manifest exists.

For `Store.read_json`: whatever reads a manifest names its kind, so that a damaged or a foreign one is told by file and field.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tasks.prompts import Split


class _Open(BaseModel):
    """May hold more than what is read again."""

    model_config = ConfigDict(extra="allow")


class Named(_Open):
    """A file, relative to the manifest."""

    path: str
    bytes: int
    sha256: str
    rows: int = 0


class Manifest(_Open):
    """What all have."""

    version: Literal[1]
    id: str
    files: list[Named] = []
    prompt_set: str | None = None
    provenance: dict[str, Any] = {}


class _Part(BaseModel):
    path: str
    category: str
    rows: int
    splits: dict[Split, int]


class _Source(_Open):
    file: str
    rows: int
    prompts: int
    capability: int
    quarantined: int
    left_out: dict[str, int]


class _Quarantined(_Open):
    file: str
    line: int
    reason: str


class _Reason(_Open):
    rows: int
    first: str


class _Benchmark(_Open):
    file: str
    rows: int
    unusable: int
    first_reason: str | None


class _Example(_Open):
    kind: str
    file: str
    line: int
    id: str
    similarity: float
    resembles: str
    at: str
    dropped: bool


class _Overlap(_Open):
    near_duplicates: int
    contaminated: int
    dropped: int
    benchmarks: list[_Benchmark]
    examples: list[_Example]


class _Counts(_Open):
    prompts: int
    capability: int
    quarantined: int


class PromptsManifest(Manifest):
    """A prompt set."""

    kind: Literal["prompts"]
    hash: str
    source: str
    sources: list[_Source]
    counts: _Counts
    parts: list[_Part]
    capability: list[str]
    quarantined: list[_Quarantined]
    reasons: dict[str, _Reason]
    overlap: _Overlap


class _Balance(_Open):
    completions: int
    kept: int
    dropped: int


class DatasetManifest(Manifest):
    """A dataset version."""

    kind: Literal["dataset"]
    name: str
    rows: int
    spare: int = 0
    preferences: int = 0
    funnel: dict[str, dict[str, int]]
    balance: _Balance


class CheckpointManifest(Manifest):
    """A checkpoint."""

    kind: Literal["sft", "rejection", "dpo", "rl"]
    weights: str


class EvaluationManifest(Manifest):
    """An evaluation."""

    kind: Literal["evaluation"]
    files: list[Named] = Field(min_length=1)
    metrics: dict[str, Any]


class RunManifest(Manifest):
    """A run."""

    kind: Literal["run"]
    datasets: list[str]
    checkpoints: list[str]
    evaluations: list[str]


PROMPTS: TypeAdapter[Any] = TypeAdapter(PromptsManifest)
DATASET: TypeAdapter[Any] = TypeAdapter(DatasetManifest)
CHECKPOINT: TypeAdapter[Any] = TypeAdapter(CheckpointManifest)
EVALUATION: TypeAdapter[Any] = TypeAdapter(EvaluationManifest)
ANY: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        PromptsManifest | DatasetManifest | CheckpointManifest | EvaluationManifest | RunManifest,
        Field(discriminator="kind"),
    ]
)

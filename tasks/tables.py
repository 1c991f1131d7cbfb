"""The schemas of everything written as Parquet, in one place. Rows carry hashes of the spec, never its text."""

import pyarrow as pa

KEY = pa.binary(16)
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

PROMPTS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_hash", pa.string()),
        ("messages", MESSAGES),
        ("category", pa.string()),
        ("cell", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("ideal_verdict", pa.string()),
        ("ideal_clauses", pa.list_(pa.string())),
    ]
)

CAPABILITY = pa.schema(
    [("id", pa.string()), ("messages", MESSAGES), ("skill", pa.string()), ("thought", pa.string()), ("answer", pa.string())]
)

QUARANTINED = pa.schema([("file", pa.string()), ("line", pa.int64()), ("reason", pa.string())])

TOMBSTONES = pa.schema([("key", KEY), ("prompt_hash", pa.string()), ("quarantined", pa.string())])

OVERLAP = pa.schema(
    [
        ("kind", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("id", pa.string()),
        ("similarity", pa.float64()),
        ("resembles", pa.string()),
        ("at", pa.string()),
        ("dropped", pa.bool_()),
    ]
)

COMPLETIONS = pa.schema(
    [
        ("key", KEY),
        ("prompt_id", pa.string()),
        ("prompt_hash", pa.string()),
        ("category", pa.string()),
        ("messages", MESSAGES),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("spec_hash", pa.string()),
        ("template_hash", pa.string()),
        ("sampling_hash", pa.string()),
        ("generator", pa.string()),
        ("generator_revision", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("thought", pa.string()),
        ("answer", pa.string()),
        ("malformed", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("content", KEY),
        ("cited_verdict", pa.string()),
        ("cited_clauses", pa.list_(pa.string())),
        ("gates", pa.string()),
        ("drop_reason", pa.string()),
        ("quarantined", pa.string()),
    ]
)

JUDGEMENTS = pa.schema(
    [
        ("key", KEY),
        ("completion_key", KEY),
        ("content", KEY),
        ("prompt_id", pa.string()),
        ("category", pa.string()),
        ("run", pa.int32()),
        ("seed", pa.int64()),
        ("view", pa.string()),
        ("spec_hash", pa.string()),
        ("judge", pa.string()),
        ("judge_revision", pa.string()),
        ("judge_hash", pa.string()),
        ("compliance", pa.int8()),
        ("helpfulness", pa.int8()),
        ("correctness", pa.int8()),
        ("thought", pa.int8()),
        ("score", pa.int8()),
        ("raw", pa.list_(pa.string())),
        ("quarantined", pa.string()),
    ]
)

TRAINING_VIEW = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("category", pa.string()),
        ("messages", MESSAGES),
        ("thought", pa.string()),
        ("answer", pa.string()),
    ]
)

PREFERENCES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("category", pa.string()),
        ("messages", MESSAGES),
        ("chosen_thought", pa.string()),
        ("chosen_answer", pa.string()),
        ("chosen_score", pa.float32()),
        ("rejected_thought", pa.string()),
        ("rejected_answer", pa.string()),
        ("rejected_score", pa.float32()),
        ("chosen_key", KEY),
        ("rejected_key", KEY),
    ]
)

AUDIT_VIEW = pa.schema(
    [
        ("key", KEY),
        ("prompt_id", pa.string()),
        ("category", pa.string()),
        ("cell", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("ideal_verdict", pa.string()),
        ("sample", pa.int32()),
        ("cited_verdict", pa.string()),
        ("cited_clauses", pa.list_(pa.string())),
        ("score", pa.int8()),
        ("scores", pa.list_(pa.int8())),
        ("spec_hash", pa.string()),
        ("template_hash", pa.string()),
        ("generator", pa.string()),
        ("generator_revision", pa.string()),
        ("judge", pa.string()),
        ("judge_revision", pa.string()),
        ("kept", pa.bool_()),
        ("drop_reason", pa.string()),
    ]
)

TRAINING_ROWS = pa.schema([("row_id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("prompt_length", pa.int32())])

PREFERENCE_ROWS = pa.schema(
    [
        ("row_id", pa.string()),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
    ]
)

ROLLOUTS = pa.schema(
    [
        ("key", KEY),
        ("prompt_id", pa.string()),
        ("category", pa.string()),
        ("cell", pa.string()),
        ("ideal_verdict", pa.string()),
        ("step", pa.int32()),
        ("group", pa.int64()),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("policy_version", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("thought_tokens", pa.int32()),
        ("malformed", pa.string()),
        ("answer_kind", pa.string()),
        ("verdicts", pa.list_(pa.list_(pa.string()))),
        ("spec_hash", pa.string()),
        ("judge", pa.string()),
        ("judge_revision", pa.string()),
        ("rewards", pa.list_(pa.float32())),
        ("reward", pa.float32()),
        ("rule_reward", pa.float32()),
        ("held_out_reward", pa.float32()),
        ("held_out_verdicts", pa.list_(pa.list_(pa.string()))),
        ("advantage", pa.float32()),
        ("drop_reason", pa.string()),
        ("quarantined", pa.string()),
    ]
)

EVALUATIONS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("category", pa.string()),
        ("cell", pa.string()),
        ("group", pa.string()),
        ("ideal_verdict", pa.string()),
        ("checkpoint", pa.string()),
        ("thought", pa.string()),
        ("answer", pa.string()),
        ("malformed", pa.string()),
        ("finish_reason", pa.string()),
        ("cited_verdict", pa.string()),
        ("cited_category", pa.string()),
        ("answer_kind", pa.string()),
        ("seed", pa.int64()),
        ("spec_hash", pa.string()),
        ("judge", pa.string()),
        ("judge_revision", pa.string()),
        ("compliance", pa.int8()),
        ("helpfulness", pa.int8()),
        ("verdicts", pa.list_(pa.list_(pa.string()))),
    ]
)

FOLDERS = {
    "parts": PROMPTS,
    "capability": CAPABILITY,
    "quarantined": QUARANTINED,
    "overlap": OVERLAP,
    "completions": COMPLETIONS,
    "judgements": JUDGEMENTS,
    "rollouts": ROLLOUTS,
    "evaluations": EVALUATIONS,
    "tombstones": TOMBSTONES,
    "data": TRAINING_VIEW,
    "spare": TRAINING_VIEW,
    "preferences": PREFERENCES,
    "audit": AUDIT_VIEW,
}
"""What the Parquet files of a folder hold; of the folders of a path the last one of these counts."""


def wrong_column(path: str, found: pa.Schema) -> str | None:
    """What is wrong with the first column that has another type than its name has in such a file, or None."""
    schema = next((FOLDERS[folder] for folder in reversed(path.split("/")[:-1]) if folder in FOLDERS), pa.schema([]))
    for field in found:
        expected = schema.field(field.name).type if field.name in schema.names else field.type
        if field.type != expected:
            return f"column {field.name} is {field.type}, not {expected}"
    return None

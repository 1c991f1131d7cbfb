"""What an inference engine is to the rest of the house: a conversation in, a completion out. Knows nothing of policies and thoughts."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.chat import Chat, Turn
from cluster.errors import UserError


class FakeConfig(BaseModel):
    """What the fake engine does. Shares are of requests, chosen by the seed; a request that is asked again meets another fate."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    seed: int = Field(0, title="Seed", description="Chooses texts, latencies and faults.")
    start_seconds: float = Field(0, ge=0, title="Start", description="How long the engine takes to start.")
    latency_seconds: float = Field(0, ge=0, title="Latency", description="Median time of an answer.")
    latency_spread: float = Field(0.3, ge=0, title="Spread", description="Standard deviation of the logarithm of the latency.")
    drop: float = Field(0, ge=0, le=1, title="Dropped", description="Share of requests whose connection is dropped.")
    error: float = Field(0, ge=0, le=1, title="Errors", description="Share of requests answered with status 500.")
    hang: float = Field(0, ge=0, le=1, title="Hanging", description="Share of requests that are never answered.")
    tokenizes: bool = Field(
        True, title="Tokenizes", description="Off: the length of a prompt is told by its characters, as if it were tokenised elsewhere."
    )
    malformed: float = Field(0, ge=0, le=1, title="Malformed", description="Share of answers that ignore grammar and schema.")
    die_at: int | None = Field(
        None, ge=0, title="Death", description="The engine dies at this request, each time it was started; 0: while it starts."
    )
    stall_at: int | None = Field(
        None, ge=1, title="Stall", description="From this request on the engine answers nothing, each time it was started."
    )
    die_on: str | None = Field(None, min_length=1, title="Deadly text", description="A prompt that holds this text kills the engine.")


class EndpointConfig(BaseModel):
    """Where an OpenAI-compatible server is, and what it can and costs. Prices are in one currency, per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    url: str = Field(title="URL", description="Address of the API, usually with `/v1` at the end. No part of any key.")
    key_variable: str | None = Field(
        "OPENAI_API_KEY",
        pattern=r"^[A-Z_][A-Z0-9_]*$",
        title="Key variable",
        description="Name of the environment variable that holds the key, never the key; null: no key is needed.",
    )
    structured: Literal["json_schema", "none"] = Field(
        "json_schema",
        title="Structured output",
        description="`json_schema`: a verdict is held by its schema, a list. `none`: for endpoints that cannot; it is only asked for.",
    )
    thinking_tokens: int = Field(
        0, ge=0, title="Thinking", description="Tokens that a reasoning model may spend on its thought before an answer held by a schema."
    )
    prompt_price: float = Field(0, ge=0, title="Prompt price", description="Price of a million prompt tokens that were not cached.")
    cached_price: float = Field(0, ge=0, title="Cached price", description="Price of a million prompt tokens that were.")
    completion_price: float = Field(0, ge=0, title="Completion price", description="Price of a million drawn tokens, thoughts included.")

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address that begins with http:// or https://")
        return url

    @property
    def host(self) -> str:
        """Name or number of the machine that requests are sent to, in lower case."""
        return urlsplit(self.url).hostname or ""

    @property
    def loopback(self) -> bool:
        """Whether that is this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def cost(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float:
        """Price of so many tokens; the cached ones are among those of the prompt."""
        fresh = prompt_tokens - cached_tokens
        return (fresh * self.prompt_price + cached_tokens * self.cached_price + completion_tokens * self.completion_price) / 1e6


class EngineConfig(BaseModel):
    """How one model is served. Part of a result's identity: `model`, `revision`, a fake's `seed`, and `identity`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    backend: Literal["vllm", "openai", "fake"] = Field(
        "vllm",
        title="Backend",
        description="`vllm`; `openai`: a server that speaks its protocol; `fake`: no model, for tests of the machine.",
    )
    fake: FakeConfig = Field(FakeConfig(), title="Fake", description="What a fake engine does.")
    endpoint: EndpointConfig | None = Field(None, title="Endpoint", description="The server, for the backend `openai`.")

    model: str = Field(
        "default", title="Model", description="`default` (SmolLM2-135M), a checkpoint directory, a hub id, or what an endpoint calls it."
    )
    revision: str | None = Field(
        None,
        title="Revision",
        description="A hub commit; read from the weights when left out. Of an endpoint's model: its date, or `unversioned`.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", title="Precision", description="Precision of the weights.")
    max_model_len: int = Field(8192, ge=256, title="Context", description="Longest prompt plus completion, in tokens.")
    max_num_seqs: int = Field(64, ge=1, title="Batch", description="Requests that one engine works on at the same time.")
    kv_cache_gib: float = Field(1.0, gt=0, title="KV cache", description="Memory for keys and values, in GiB (CPU engines).")
    engines: int = Field(1, ge=1, title="Engines", description="Number of engines; on a CPU, one per core is fastest.")
    gpus: float = Field(0, ge=0, le=1, title="GPUs", description="0 runs on CPU; a fraction lets engines share a GPU.")
    tensor_parallel: int = Field(
        1, ge=1, title="Tensor parallel", description="GPUs, or cores, that hold a share of one engine's weights each, all of one machine."
    )
    attempts: int = Field(5, ge=1, title="Attempts", description="Tries of a request that is not answered, before its row is quarantined.")
    request_seconds: float = Field(3600, gt=0, title="Request time", description="A request that takes longer is asked again.")
    start_seconds: float = Field(
        1800, gt=0, title="Start", description="The run ends when no engine is there for so long: they die, or their machine is gone."
    )
    stuck_seconds: float = Field(
        900, gt=0, title="Stuck", description="An engine that answers nothing for so long, with requests to answer, is started again."
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, title="GPU memory", description="Share of the GPU's memory for this engine; engines that share one add up to 1."
    )

    @model_validator(mode="after")
    def _names_an_endpoint(self) -> "EngineConfig":
        if self.backend == "openai" and self.endpoint is None:
            raise ValueError("backend `openai` needs an `endpoint` with a `url`")
        if self.backend == "openai" and not self.revision:
            raise ValueError(
                "state the `revision` of the endpoint's model, or `unversioned`: nothing else would say that its answers changed"
            )
        return self

    @model_validator(mode="after")
    def _shares_weights_or_gpus(self) -> "EngineConfig":
        if self.tensor_parallel > 1 and self.gpus not in (0, 1):
            raise ValueError(f"an engine that `tensor_parallel` spreads over {self.tensor_parallel} GPUs has them to itself: set `gpus: 1`")
        return self

    @property
    def remote(self) -> EndpointConfig | None:
        """The endpoint that answers, if one does."""
        return self.endpoint if self.backend == "openai" else None

    def identity(self, held: bool = False) -> dict[str, object]:
        """What of this, beside the model, makes an answer another one, or one that is `held` by a schema.

        Here that is the context; an endpoint's is known to the endpoint alone.
        """
        if self.remote is None:
            return {"context": self.max_model_len}
        return {"structured": self.remote.structured, "thinking": self.remote.thinking_tokens} if held else {}


@dataclass(frozen=True)
class Sampling:
    """How one completion is drawn. `grammar` (EBNF) or `json_schema` hold the output; at most one of them is set."""

    temperature: float
    max_tokens: int
    seed: int
    grammar: str | None = None
    json_schema: str | None = None
    logprobs: bool = False


@dataclass(frozen=True)
class Completion:
    """What an engine answered. `finish_reason` is `stop` or `length`; `logprobs` of the drawn tokens, if asked for.

    An endpoint gives no ids. Its `text` is what comes after the thought, and `thought` what it gives apart as that, None if nothing.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    thought: str | None = None


class Unavailable(Exception):
    """This request was not answered, another attempt may be: a dropped connection, an overloaded server."""


class Busy(Unavailable):
    """The server answers nobody now, or not so many: nothing is wrong with this request. It is to be asked again after `pause` seconds."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class EngineDied(Exception):
    """The engine's process is gone; no later request can be answered."""


class Engine(Protocol):
    """One served model."""

    async def complete(self, turns: Sequence[Turn], sampling: Sampling) -> Completion:
        """Draws the assistant's next turn of a conversation. Raises ValueError for a request it refuses, Unavailable, and EngineDied."""
        ...


def request_ids(chat: Chat, turns: Sequence[Turn], sampling: Sampling, config: EngineConfig) -> list[int]:
    """Token ids of a request to an engine that owns a tokenizer.

    Raises ValueError when the chat template refuses the turns, or when the request does not fit the engine's context: a shorter
    completion would be another one.
    """
    try:
        ids = chat.prompt(turns)
    except UserError as error:
        raise ValueError(str(error)) from error
    if len(ids) + sampling.max_tokens > config.max_model_len:
        raise ValueError(f"prompt of {len(ids)} tokens and {sampling.max_tokens} to draw exceed max_model_len {config.max_model_len}")
    return ids

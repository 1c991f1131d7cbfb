"""An OpenAI-compatible endpoint behind the `Engine` interface. The only module that imports the client `openai`.

Nothing but the conversation and how to continue it is sent, to the configured host alone: redirects are not followed, and what is meant for
this machine passes no proxy. The key comes from the environment of the process that asks, and is in no message.
"""

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from cluster.chat import Turn
from cluster.engine import Busy, Completion, EndpointConfig, EngineConfig, Sampling, Unavailable
from cluster.errors import UserError
from cluster.limit import Limit
from cluster.models import Model

CONNECT_SECONDS = 10.0
NO_KEY = "none"
"""Sent to an endpoint that needs no key; the client insists on one."""
BUSY = {429, 503, 529}
"""Statuses that say: later, or less."""
REFUSED = {400, 413, 422}
"""Statuses that concern one request and not the next."""
QUOTA = "insufficient_quota"
"""The code of a 429 that no waiting helps against."""
SHOWN = 300
"""Characters of a server's message that are repeated."""


def endpoint_model(config: EngineConfig) -> Model:
    """What rows name as their model: the name that the endpoint serves, and the revision that the run file states. Nothing lies here."""
    return Model("", config.model, config.revision or "")


def endpoint_key(endpoint: EndpointConfig) -> str:
    """The key of an endpoint, from the environment. Raises UserError that names the variable when it is not set."""
    if endpoint.key_variable is None:
        return NO_KEY
    key = os.environ.get(endpoint.key_variable)
    if not key:
        raise UserError(
            f"the endpoint {endpoint.host} needs a key: set the environment variable {endpoint.key_variable}, on a cluster on every node, "
            "or `key_variable: null` where there is none."
        )
    return key


class _Late(Unavailable):
    """An answer did not come in time, perhaps because the server has too much to do."""


class OpenAIEngine:
    """A client of one endpoint, which sends as many requests at a time as that takes, up to `max_num_seqs`."""

    def __init__(self, config: EngineConfig, endpoint: EndpointConfig) -> None:
        self.config, self.endpoint = config, endpoint
        self.limit = Limit(config.max_num_seqs)
        self._client: Any = None
        self._key = ""

    async def start(self) -> None:
        """Takes the key; sends nothing. Raises UserError when there is none."""
        from openai import AsyncOpenAI, DefaultAioHttpClient, Timeout

        self._key = endpoint_key(self.endpoint)
        patience = Timeout(self.config.request_seconds, connect=CONNECT_SECONDS)
        # Over aiohttp, and past the client's check of parameters that it types, a request costs a third of the processor's time.
        http = DefaultAioHttpClient(timeout=patience, follow_redirects=False, trust_env=not self.endpoint.loopback)
        # Every retry is made in cluster.serving.
        self._client = AsyncOpenAI(api_key=self._key, base_url=self.endpoint.url, timeout=patience, max_retries=0, http_client=http)

    async def complete(self, turns: Sequence[Turn], sampling: Sampling) -> Completion:
        """Draws one completion; see `Engine.complete`. Raises UserError when the endpoint refuses the key, the model or the address."""
        from openai import APIError
        from openai.types.chat import ChatCompletion

        if sampling.grammar or sampling.logprobs:
            raise ValueError("an endpoint takes no grammar and gives no log-probabilities of what it drew")
        async with self.limit.room() as sent:
            failure: Exception | None = None
            try:
                answer = await self._client.post("/chat/completions", body=self._request(turns, sampling), cast_to=ChatCompletion)
            except APIError as error:
                failure = self._failure(error)
                if isinstance(failure, Busy | _Late):
                    self.limit.pushed_back(sent, getattr(failure, "pause", 0.0))
            if failure:
                raise failure
            completion = self._completion(answer)
            self.limit.answered(sent, sampling.max_tokens, completion.completion_tokens)
        return completion

    async def load_weights(self, path: str, version: int) -> None:
        """An endpoint keeps the weights that it has."""
        raise UserError(f"the endpoint {self.endpoint.host} takes no weights: it can generate and judge, not be trained or evaluated.")

    async def stop(self) -> None:
        """Closes the connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _request(self, turns: Sequence[Turn], sampling: Sampling) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.config.model,
            "messages": [dict(turn) for turn in turns],
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "max_completion_tokens": sampling.max_tokens,
        }
        if sampling.json_schema:
            request["max_completion_tokens"] += self.endpoint.thinking_tokens
            if self.endpoint.structured == "json_schema":
                held = {"name": "answer", "schema": json.loads(sampling.json_schema), "strict": True}
                request["response_format"] = {"type": "json_schema", "json_schema": held}
        return request

    def _completion(self, answer: Any) -> Completion:
        """What the endpoint said. Raises Unavailable when that is no completion, ValueError when its filter withholds the text."""
        choices = getattr(answer, "choices", None)
        if not choices or choices[0].message is None:
            raise Unavailable(f"{self.endpoint.host} answered without a completion")
        message, reason = choices[0].message, choices[0].finish_reason
        if reason == "content_filter":
            raise ValueError(f"{self.endpoint.host} withholds the answer: content_filter")
        thoughts = (getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
        usage = answer.usage
        details = usage.prompt_tokens_details if usage else None
        return Completion(
            text=message.content or message.refusal or "",
            finish_reason="length" if reason == "length" else "stop",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            thought=next((thought for thought in thoughts if isinstance(thought, str)), None),
        )

    def _failure(self, error: Any) -> Exception:
        """What an error of the client means to the rest of the house."""
        from aiohttp import ClientConnectorError, ConnectionTimeoutError, ServerTimeoutError
        from openai import APIConnectionError, APIStatusError

        host, endpoint = self.endpoint.host, self.endpoint
        if isinstance(error, APIConnectionError):
            origin = error.__cause__ and error.__cause__.__cause__  # the client calls a connection that breaks off late, too
            if isinstance(origin, ClientConnectorError | ConnectionTimeoutError):
                return Busy(f"{host} cannot be reached")
            if isinstance(origin, ServerTimeoutError):
                return _Late(f"{host} did not answer in {self.config.request_seconds:g} s")
            return Unavailable(f"{host} broke the connection off")
        if not isinstance(error, APIStatusError):
            return Unavailable(f"{host} answered with something that is no completion")
        status, said = error.status_code, self._said(error)
        if status in (401, 403):
            key = f"the key in the environment variable {endpoint.key_variable}" if endpoint.key_variable else "a request without a key"
            return UserError(f"{host} refuses {key} for the model {self.config.model!r} (status {status}).")
        if status == 429 and error.code == QUOTA:
            return UserError(f"{host}: the quota is used up. {said}")
        if status in BUSY:
            return Busy(f"{host} is busy (status {status})", min(_retry_after(error.response.headers), self.config.stuck_seconds / 2))
        if status in REFUSED:
            return ValueError(f"{host} refuses the request (status {status}): {said}")
        if status >= 500 or status in (408, 409, 425):
            return Unavailable(f"{host} answered with status {status}")
        return UserError(
            f"{host} answers with status {status} for the model {self.config.model!r}; check the endpoint's url. {said}".strip()
        )

    def _said(self, error: Any) -> str:
        """The server's own words, without the key should it repeat it."""
        words = " ".join(str(error.message).split()).replace(self._key, "***")
        return words[:SHOWN]


def _retry_after(headers: Any) -> float:
    """Seconds that the server asks to wait: a number, or a date, which its own clock is compared with. 0 when it says nothing."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
            seconds = (parsedate_to_datetime(value) - now).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return seconds if seconds > 0 else 0.0

"""The OpenAI API's requests, as far as they are served. A field that is not here is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from quire_engine.errors import InvalidParameter
from quire_engine.text.params import MAX_BIASES, MAX_STOP_TOKENS, SamplingParams

Text = Annotated[str, Field(max_length=1 << 24)]
_SHARED = [
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
]


class Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream says besides its tokens."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Sampling(Strict):
    """Parameters of both kinds of completion. None means: not given."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKENS)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=MAX_BIASES)
    allowed_token_ids: list[int] | None = None
    bad_words: list[Text] | None = None
    structured_outputs: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    echo: bool = False
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    request_id: str | None = Field(None, max_length=128, pattern=r"^[\w.:\-]+$")
    return_token_ids: bool = False
    cache_salt: str | None = Field(None, max_length=256)

    def _params(self, *, max_tokens: int | None, logprobs: int | None, **others: Any) -> SamplingParams:
        given = {name: value for name in _SHARED if (value := getattr(self, name)) is not None} | others
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        if self.stream_options is not None and not self.stream:
            raise InvalidParameter("stream_options is only for stream = true", "stream_options")
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)


class CompletionRequest(_Sampling):
    """POST /v1/completions"""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True

    def sampling(self) -> SamplingParams:
        """Raises InvalidParameter."""
        if self.best_of not in (None, self.n or 1):
            raise InvalidParameter("best_of other than n is not supported; leave it out", "best_of")
        if self.suffix:
            raise InvalidParameter("suffix is not supported; leave it out", "suffix")
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        scored: dict[str, int] = {}
        if self.echo and (self.logprobs is not None or max_tokens == 0):
            scored["prompt_logprobs"] = self.logprobs or 0
        return self._params(max_tokens=max_tokens, logprobs=self.logprobs, **scored)


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message; what else a template may read (name, tool calls of a past turn) is passed on to it."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(max_length=64)
    content: Text | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """Parts joined: templates of text models want a string."""
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        return message


class ResponseFormat(Strict):
    """Only plain text, for now."""

    type: Literal["text"]


class ChatCompletionRequest(_Sampling):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, max_length=100_000)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def sampling(self) -> SamplingParams:
        """Raises InvalidParameter."""
        if self.tools or self.tool_choice not in (None, "none", "auto"):
            raise InvalidParameter("tools are not supported yet; leave tools and tool_choice out", "tools")
        if self.chat_template is not None:
            raise InvalidParameter(
                "chat_template cannot come with a request; start the server with --chat-template",
                "chat_template",
            )
        if self.reasoning_effort is not None:
            raise InvalidParameter("reasoning_effort is not supported; leave it out", "reasoning_effort")
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise InvalidParameter(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidParameter("top_logprobs needs logprobs = true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidParameter("max_tokens and max_completion_tokens differ; give one", "max_tokens")
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._params(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class EmbeddingRequest(Strict):
    """POST /v1/embeddings"""

    model: str | None = None
    input: Text | list[Text] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None

    def inputs(self) -> list[str | list[int]]:
        """One or several."""
        given = self.input
        single = isinstance(given, str) or bool(given and isinstance(given[0], int))
        found: list[Any] = [given] if single else list(given)
        return found


class ScoreRequest(Strict):
    """POST /v1/score"""

    model: str | None = None
    text_1: Text | list[Text]
    text_2: Text | list[Text]


class RerankRequest(Strict):
    """POST /v1/rerank"""

    model: str | None = None
    query: Text
    documents: list[Text]
    top_n: int | None = None
    return_documents: bool = True


class TokenizeRequest(Strict):
    """POST /tokenize"""

    model: str | None = None
    prompt: Text | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int] = Field(max_length=1 << 22)


def _token_id(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 10:
        raise InvalidParameter(f"logit_bias has the key {key[:40]!r}; keys are token ids", "logit_bias")
    return int(key)

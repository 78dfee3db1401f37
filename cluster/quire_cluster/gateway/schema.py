"""The OpenAI API's requests, as far as they are served. A field that is not here is refused by name; what asks for
nothing here is accepted, and listed in docs/api.md."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field
from quire_engine.errors import InvalidParameter
from quire_engine.guidance.schemas import closed
from quire_engine.guidance.structure import StructuredOutputs
from quire_engine.request import MAX_LOGPROBS
from quire_engine.text.formats.chat import ToolUse
from quire_engine.text.formats.tools import MAX_TOOLS
from quire_engine.text.params import MAX_BAD_WORDS, MAX_BIASES, MAX_STOP_TOKENS, SamplingParams

from quire_cluster.gateway.fields import (
    Documents,
    Ignored,
    Int32,
    Messages,
    Prompts,
    Strict,
    Text,
    TextOrTexts,
    TokenIds,
    at_most,
)

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


class StreamOptions(Strict):
    """What a stream says besides its tokens."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Ignored = None


class OfModel(Strict):
    """What every call says; none: the model that there is."""

    model: str | None = None


class _Sampling(OfModel):
    """Parameters of both kinds of completion. None means: not given."""

    renamed = {
        f"guided_{name}": f'structured_outputs = {{"{name}": ...}}'
        for name in ("json", "regex", "choice", "grammar", "json_object")
    } | {"guided_decoding_backend": "nothing: llguidance is used", "guided_whitespace_pattern": "nothing instead"}
    n: Int32 | None = None
    max_tokens: Int32 | None = None
    min_tokens: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: TextOrTexts | None = None
    stop_token_ids: Annotated[TokenIds | None, at_most(MAX_STOP_TOKENS)] = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: Int32 | None = None
    logit_bias: Annotated[dict[str, float] | None, at_most(MAX_BIASES)] = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[TextOrTexts | None, at_most(MAX_BAD_WORDS)] = None
    structured_outputs: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    echo: bool = False
    priority: Int32 = 0
    request_id: str | None = Field(None, max_length=128, pattern=r"^[\w.:\-]+$")
    return_token_ids: bool = False
    cache_salt: str | None = Field(None, max_length=256)
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    def _params(self, *, max_tokens: int | None, logprobs: int | None, **others: Any) -> SamplingParams:
        given = {name: value for name in _SHARED if (value := getattr(self, name)) is not None} | others
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        if self.stream_options is not None and not self.stream:
            raise InvalidParameter("stream_options is only for stream = true", "stream_options")
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)


class CompletionRequest(_Sampling):
    """POST /v1/completions"""

    prompt: Prompts
    logprobs: Int32 | None = None
    best_of: Int32 | None = None
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


class JsonSchemaFormat(Strict):
    """A schema with a name that nothing here reads."""

    name: Ignored = None
    description: Ignored = None
    strict: bool | None = None
    schema_: Any = Field(None, alias="schema")


class ResponseFormat(Strict):
    """OpenAI's way to ask for a structure."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def structure(self) -> StructuredOutputs | None:
        """The same as the field's parameter. Raises InvalidParameter."""
        if self.type != "json_schema":
            if self.json_schema is not None:
                raise InvalidParameter("json_schema is only for type = json_schema", "response_format")
            return StructuredOutputs(json_object=True) if self.type == "json_object" else None
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise InvalidParameter("response_format of type json_schema wants json_schema.schema", "response_format")
        return StructuredOutputs(
            json=closed(self.json_schema.schema_, "response_format"), lenient=self.json_schema.strict is False
        )


class ChatCompletionRequest(_Sampling):
    """POST /v1/chat/completions"""

    renamed = _Sampling.renamed | {"functions": "tools", "function_call": "tool_choice"}
    messages: Messages
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any] | None, at_most(MAX_TOOLS)] = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    reasoning_effort: str | None = Field(None, max_length=32)
    thinking_token_budget: Int32 | None = None
    verbosity: str | None = Field(None, max_length=32)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prediction: Ignored = None

    def sampling(self) -> SamplingParams:
        """Raises InvalidParameter."""
        if self.chat_template is not None:
            raise InvalidParameter(
                "chat_template cannot come with a request; start the server with --chat-template",
                "chat_template",
            )
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
        if not 0 <= (self.top_logprobs or 0) <= MAX_LOGPROBS:
            raise InvalidParameter(
                f"top_logprobs is {self.top_logprobs}; it must be between 0 and {MAX_LOGPROBS}", "top_logprobs"
            )
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidParameter("max_tokens and max_completion_tokens differ; give one", "max_tokens")
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        with self.structure_named():
            structure = self.response_format.structure() if self.response_format is not None else None
        if structure is not None and self.structured_outputs is not None:
            raise InvalidParameter("response_format and structured_outputs exclude each other", "structured_outputs")
        others: dict[str, Any] = {"structured_outputs": structure} if structure is not None else {}
        others["thinking_token_budget"] = self.thinking_token_budget
        return self._params(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None, **others)

    @contextmanager
    def structure_named(self) -> Iterator[None]:
        """What is wrong with a structure is said of the field that it came in."""
        try:
            yield
        except InvalidParameter as error:
            if error.parameter != "structured_outputs" or self.structured_outputs is not None:
                raise
            said = str(error).replace("structured_outputs", "response_format")
            raise InvalidParameter(said, "response_format") from error

    def tool_use(self) -> ToolUse:
        """Raises InvalidParameter."""
        return ToolUse.of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def template_variables(self, known: frozenset[str]) -> dict[str, Any]:
        """What the chat template gets besides the messages. `known`: what it reads. Raises InvalidParameter."""
        variables = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            if "reasoning_effort" not in known:
                raise InvalidParameter(
                    "reasoning_effort is not read by this model's chat template; leave it out", "reasoning_effort"
                )
            variables.setdefault("reasoning_effort", self.reasoning_effort)
        if self.verbosity is not None and "verbosity" in known:
            variables.setdefault("verbosity", self.verbosity)
        return variables


class EmbeddingRequest(OfModel):
    """POST /v1/embeddings"""

    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Int32 | None = None
    user: Ignored = None

    def inputs(self) -> list[str | list[int]]:
        """One or several."""
        given = self.input
        single = isinstance(given, str) or bool(given and isinstance(given[0], int))
        found: list[Any] = [given] if single else list(given)
        return found


class ScoreRequest(OfModel):
    """POST /v1/score"""

    text_1: TextOrTexts
    text_2: TextOrTexts
    user: Ignored = None


class RerankRequest(OfModel):
    """POST /v1/rerank, /v2/rerank and /rerank"""

    query: Text
    documents: Documents
    top_n: Int32 | None = None
    return_documents: bool = True
    user: Ignored = None


class TokenizeRequest(OfModel):
    """POST /tokenize"""

    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(OfModel):
    """POST /detokenize"""

    tokens: TokenIds


def _token_id(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 10:
        raise InvalidParameter(f"logit_bias has the key {key[:40]!r}; keys are token ids", "logit_bias")
    return int(key)

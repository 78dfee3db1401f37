"""Offline inference: one engine in this process (with tensor parallelism, over worker processes)."""

import itertools
import logging
import os
import random
import re
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from quire_cluster.config import MediaConfig
from quire_engine.config import DEMO_MODEL, EngineConfig
from quire_engine.engine import Engine, Executor
from quire_engine.errors import ContextTooLong, EngineFailure, InvalidParameter, QuireError
from quire_engine.outcome import StepOutcome
from quire_engine.pooling import Pooling, pooling_of
from quire_engine.request import EngineSampling, Request, check_length
from quire_engine.step import Floats, TokenLogprobs
from quire_engine.text.formats.chat import Answer, ChatFormat, ToolUse
from quire_engine.text.output import OutputText
from quire_engine.text.params import SamplingParams, TokenSampling
from quire_engine.text.tokenizer import Tokenizer, end_tokens
from quire_engine.weights.resolve import ModelFiles, find_model
from tqdm import tqdm

from quire.interrupts import held_back
from quire.pictures import OfflineImage, OfflineImages

log = logging.getLogger(__name__)
Prompt = str | list[int]
PromptWithImages = Prompt | Mapping[str, Any]  # {"prompt": ..., "multi_modal_data": {"image": ...}}


@dataclass
class ToolCall:
    """A tool that a model calls. `arguments`: JSON text, cut off where the answer was."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass
class Completion:
    """One choice. One that failed has the finish reason "error", the text so far, and what happened in `error`."""

    index: int
    text: str  # the content alone, of a conversation's answer
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    error: QuireError | None = None
    reasoning: str = ""  # of a conversation's answer
    num_reasoning_tokens: int = 0
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass
class RequestOutput:
    """What came of one prompt."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    images: tuple[OfflineImage, ...] = ()


@dataclass
class _Choice:
    request: Request
    text: OutputText
    completion: Completion
    output: RequestOutput


class LLM:
    """`LLM("path or hub id").generate(["Hello"], SamplingParams(max_tokens=32))`. Options are EngineConfig's fields.

    For any number of threads, one of which generates at a time. Ctrl-C ends a batch between two of its steps, and the
    next batch is served as ever.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = DEMO_MODEL,
        *,
        chat_template: str | None = None,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
        allowed_media_domains: str | None = None,
        allowed_local_media_path: str | None = None,
        **options: Any,
    ) -> None:
        media = MediaConfig(
            allowed_media_domains=allowed_media_domains, allowed_local_media_path=allowed_local_media_path
        )
        # Nobody waits for an answer while a batch is queued, so none of it is refused.
        config = EngineConfig(model=os.fspath(model), **(options | {"max_num_queued_reqs": sys.maxsize}))
        files = find_model(config)
        self.tokenizer = Tokenizer.load(files, other=config.tokenizer, chat_template=chat_template)
        self.chat_format = ChatFormat(self.tokenizer, tool_parser=tool_call_parser, reasoning_parser=reasoning_parser)
        self._end_tokens = end_tokens(files, self.tokenizer)
        self._pooling = pooling_of(files, config.task)
        self.images = OfflineImages(files, config, media)
        self._vocab_size: int = files.config["vocab_size"]
        self._executor = self._start(config, files)
        self.engine = Engine(self._executor)
        self._ids = itertools.count(1)
        self._one_at_a_time = threading.Lock()
        self._unusable = ""  # why
        self._end = weakref.finalize(self, _close, self.engine, os.getpid())

    def _start(self, config: EngineConfig, files: ModelFiles) -> Executor:
        if config.num_workers == 1:
            from quire_engine.execution.runner import ModelRunner

            return ModelRunner(config, files, tokenizer=self.tokenizer)
        from quire_cluster.workers import LocalWorkers
        from quire_engine.models.check import check_model

        check_model(config)  # before processes are started
        return LocalWorkers(config)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the workers, if there are any, once what runs is through. Idempotent; nothing is served any more."""
        with self._one_at_a_time:
            self._unusable = self._unusable or "it is closed"
            self._end()

    def generate(
        self,
        prompts: PromptWithImages | Iterable[PromptWithImages],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_special_tokens: bool = True,
    ) -> list[RequestOutput]:
        """Completes every prompt, all in one batch; results come in the prompts' order. A prompt is a text, token ids,
        or a text with images in the places that it has for them: `{"prompt": "<image> What is it?",
        "multi_modal_data": {"image": picture}}`, where a picture is a PIL image, the bytes of a file, or a path.

        Raises InvalidParameter or ContextTooLong before anything runs if any of them cannot be served. A choice that
        fails while it is computed fails alone; see Completion.
        """
        if self._pooling is not None:
            raise InvalidParameter("this model gives no text; call embed", "prompts")
        batch = _batch(prompts, "prompts")
        each = _params_of_each(sampling_params, len(batch))
        asked: list[tuple[RequestOutput, TokenSampling]] = []
        samplings: dict[int, TokenSampling] = {}  # by the identity of what they are made of
        for prompt, wanted in zip(batch, each, strict=True):
            if id(wanted) not in samplings:
                samplings[id(wanted)] = self.sampling(wanted)
            images: tuple[OfflineImage, ...] = ()
            if isinstance(prompt, Mapping):
                prompt, images = self._with_images(prompt)
            tokens = self._tokens(prompt, "prompts", add_special_tokens=add_special_tokens)
            output = RequestOutput(prompt if isinstance(prompt, str) else None, tokens, images=images)
            asked.append((output, samplings[id(wanted)]))
        return self.run(asked, use_tqdm=use_tqdm)

    def _with_images(self, prompt: Mapping[str, Any]) -> tuple[str, tuple[OfflineImage, ...]]:
        """Raises InvalidParameter."""
        text, data = prompt.get("prompt"), prompt.get("multi_modal_data")
        if not isinstance(text, str) or not isinstance(data, Mapping) or data.keys() != {"image"} or len(prompt) != 2:
            raise InvalidParameter(
                f"prompts holds {prompt!r:.80}, which is no text and no list of token ids; a text with images is "
                '{"prompt": a text, "multi_modal_data": {"image": one, or a list}}',
                "prompts",
            )
        images = self.images.in_text(data["image"])
        return (self.images.expanded(text, images) if images else text), images

    def sampling(self, params: SamplingParams, answer: Answer | None = None) -> TokenSampling:
        """What `run` takes; `answer`: to a conversation. Raises InvalidParameter."""
        return params.in_tokens(self.tokenizer, vocab_size=self._vocab_size, end_tokens=self._end_tokens, answer=answer)

    def run(self, asked: list[tuple[RequestOutput, TokenSampling]], *, use_tqdm: bool = True) -> list[RequestOutput]:
        """Fills each output from its prompt's token ids. Raises as `generate` does."""
        choices = {choice.request.id: choice for output, wanted in asked for choice in self._choices(output, wanted)}
        with self._engine_for([choice.request for choice in choices.values()]):
            self._run(choices, use_tqdm)
        return [output for output, _ in asked]

    def embed(self, texts: Prompt | Iterable[Prompt]) -> list[Floats]:
        """A vector for each text (or token ids), in their order; of a classifier, its score.

        Raises InvalidParameter for a model that generates or for token ids that it lacks, ContextTooLong for a text
        that does not fit.
        """
        if self._pooling is None:
            raise InvalidParameter("this model generates; open it with task='embed'", "task")
        requests: list[Request] = []
        for text in _batch(texts, "texts"):
            tokens = self._tokens(text, "texts")
            self.check_text(tokens)
            sampling = EngineSampling(temperature=0.0, max_tokens=1)
            requests.append(Request(next(self._ids), tokens, len(tokens), sampling, arrival=time.monotonic()))
        found: dict[int, Floats] = {}
        with self._engine_for(requests):
            while self.engine.has_work:
                found |= {request.id: vector for request, vector in self._step().vectors}
        return [found[request.id] for request in requests]

    def check_text(self, tokens: list[int]) -> None:
        """Raises InvalidParameter or ContextTooLong for token ids that `embed` would refuse."""
        self._check_ids(tokens, "texts")
        context = self._executor.limits.max_model_len - 1
        if not 1 <= len(tokens) <= context:
            raise ContextTooLong(f"a text has {len(tokens)} tokens; from 1 to {context} fit", "texts")

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: str | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation or many. `tools`, `tool_choice` and `parallel_tool_calls` are OpenAI's, and so are
        parts of messages; besides, `{"type": "image", "image": picture}` is one: see `generate`.

        Raises InvalidParameter or ContextTooLong before anything runs, as `generate` does.
        """
        if self._pooling is not None:
            raise InvalidParameter("this model gives no text; call embed", "messages")
        given: Any = messages
        many = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
        if not all(isinstance(one, list) and all(isinstance(turn, dict) for turn in one) for one in many):
            raise InvalidParameter(
                "messages must be a list of objects with role and content, or lists of it", "messages"
            )
        params = sampling_params or SamplingParams(max_tokens=None)
        use = ToolUse.of(tools, tool_choice, parallel_tool_calls)
        asked: list[tuple[RequestOutput, TokenSampling]] = []
        for one in many:
            turns = self.images.in_conversation(one)
            prompt = self.tokenizer.render(turns, add_generation_prompt=True, continue_final_message=False, tools=tools)
            prompt, images = self.images.rendered(prompt, turns)
            tokens = self._tokens(prompt, "messages", add_special_tokens=False)
            answer = self.chat_format.answer(
                tokens, use, params.structured_outputs, thinking_budget=params.thinking_token_budget
            )
            asked.append((RequestOutput(prompt, tokens, images=images), self.sampling(params, answer)))
        return self.run(asked, use_tqdm=use_tqdm)

    @property
    def pooling(self) -> Pooling | None:
        """Of a model that gives vectors or scores instead of text."""
        return self._pooling

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Raises InvalidParameter or ContextTooLong for what `generate` would refuse."""
        if not prompt:
            raise InvalidParameter("the prompt has no tokens", "prompt")
        self._check_ids(prompt, "prompt")
        check_length(len(prompt), params.max_tokens, self.engine.scheduler.context)
        params.check(self._vocab_size, self.engine.scheduler.context - len(prompt))

    def _tokens(self, text: Prompt, name: str, *, add_special_tokens: bool = True) -> list[int]:
        if isinstance(text, str):
            if lone := re.search("[\ud800-\udfff]", text):
                raise InvalidParameter(f"{name} holds {lone[0]!r}, half of a character; leave it out", name)
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not isinstance(text, list) or not all(type(token) is int for token in text):
            raise InvalidParameter(f"{name} holds {text!r:.80}, which is no text and no list of token ids", name)
        return list(text)

    def _check_ids(self, tokens: list[int], name: str) -> None:
        if bad := [token for token in tokens if not 0 <= token < self._vocab_size]:
            raise InvalidParameter(f"{name} holds token id {bad[0]}; ids go from 0 to {self._vocab_size - 1}", name)

    def _choices(self, output: RequestOutput, sampling: TokenSampling) -> list[_Choice]:
        prompt, params = output.prompt_token_ids, sampling.params
        self.check(prompt, params)
        seed = params.seed if params.seed is not None else random.getrandbits(63)
        spans = self.images.spans(prompt, output.images)
        made = []
        for index, wanted in enumerate(sampling.choices(room=self.engine.scheduler.context - len(prompt), seed=seed)):
            completion = Completion(index, "", [], "")
            if params.logprobs is not None:
                completion.logprobs = []
            output.outputs.append(completion)
            request = Request(
                next(self._ids), list(prompt), len(prompt), wanted, arrival=time.monotonic(), images=spans
            )
            made.append(
                _Choice(request, OutputText(self.tokenizer, params, prompt, sampling.answer), completion, output)
            )
        return made

    @contextmanager
    def _engine_for(self, requests: list[Request]) -> Iterator[None]:
        """The engine with these requests, of which it has none left afterwards. Raises EngineFailure if it is closed or
        broke down."""
        with self._one_at_a_time, held_back() as self._let_interrupts_in:
            if self._unusable:
                raise EngineFailure(f"this LLM serves nothing any more: {self._unusable}; open another")
            try:
                for request in requests:
                    self.engine.add(request)
                yield
            finally:
                for request in requests:
                    self.engine.abort(request.id)
                while self.engine.has_work and not self._unusable:
                    self._step(interruptible=False)

    def _step(self, *, interruptible: bool = True) -> StepOutcome:
        """One of the engine's, whole: what ends it half way leaves an engine that nobody can go on with."""
        try:
            outcome = self.engine.step()
        except BaseException as error:
            self._unusable = f"a step failed ({type(error).__name__}: {error})"
            raise
        if interruptible:
            self._let_interrupts_in()
        return outcome

    def _run(self, choices: dict[int, _Choice], use_tqdm: bool) -> None:
        left = set(choices)
        with tqdm(total=len(left), desc="Requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
            generated, started = 0, time.monotonic()
            while left:
                outcome = self._step()
                for request, key in outcome.wanted:
                    wanted = next(image for image in choices[request.id].output.images if image.key == key)
                    self.engine.scheduler.provide(key, self.images.inputs(wanted))
                for request, scores in outcome.logprobs:
                    kept = choices[request.id].completion.logprobs
                    if kept is not None:
                        kept.append(scores)
                for request, _, scores in outcome.prompt_logprobs:
                    output = choices[request.id].output
                    output.prompt_logprobs = [*(output.prompt_logprobs or []), scores]
                generated += len(outcome.tokens)
                news: list[tuple[Request, Callable[[_Choice], None]]] = [
                    (request, partial(_accept, token=token, index=index))
                    for request, token, index in zip(outcome.requests, outcome.tokens, outcome.indexes, strict=True)
                ]
                for request, act in [*news, *((request, _finish) for request in outcome.finished)]:
                    if request.id in left and self._ended(choices[request.id], act):
                        left.remove(request.id)
                        bar.update()
                if use_tqdm:
                    bar.set_postfix_str(
                        f"{generated / max(time.monotonic() - started, 1e-9):.0f} tokens/s", refresh=False
                    )

    def _ended(self, choice: _Choice, act: Callable[[_Choice], None]) -> bool:
        """Whether a choice has its ending after `act`: whatever that raises ends this choice, and no other."""
        completion, request = choice.completion, choice.request
        try:
            act(choice)
        except Exception as error:
            log.exception("choice %d of a prompt ends with an error", completion.index)
            completion.finish_reason = "error"
            completion.error = error if isinstance(error, QuireError) else EngineFailure(f"internal error: {error}")
        if completion.finish_reason:
            self.engine.abort(request.id)  # nothing, where it has ended there too
        return bool(completion.finish_reason)


def _accept(choice: _Choice, token: int, index: int) -> None:
    completion, text, request = choice.completion, choice.text, choice.request
    completion.token_ids.append(token)
    text.push(token, request.finish_reason == "stop" and index == request.num_output - 1)
    _show(choice)
    if text.stopped_by is not None:
        completion.finish_reason, completion.stop_reason = "stop", text.stopped_by
        if completion.logprobs is not None:  # the step may have drawn tokens behind
            del completion.logprobs[len(completion.token_ids) :]


def _finish(choice: _Choice) -> None:
    completion, request = choice.completion, choice.request
    if request.error is not None:
        raise request.error
    choice.text.finish()
    _show(choice)
    completion.finish_reason = request.finish_reason or "abort"
    if completion.finish_reason == "stop" and completion.tool_calls:
        completion.finish_reason = "tool_calls"
    completion.stop_reason = request.stop_token_id
    choice.output.num_cached_tokens = max(request.num_cached, 0)


def _show(choice: _Choice) -> None:
    completion, shown = choice.completion, choice.text.take()
    completion.text += shown.content
    completion.reasoning += shown.reasoning
    completion.num_reasoning_tokens = choice.text.num_reasoning_tokens
    for part in shown.calls:
        if part.name is not None:
            completion.tool_calls.append(ToolCall(part.name, ""))
        completion.tool_calls[part.index].arguments += part.arguments


def _batch(prompts: Any, name: str) -> list[Any]:
    """One prompt, or several. Raises InvalidParameter for token ids among prompts, and for what is neither."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise InvalidParameter(f"{name} is {prompts!r:.80}; give a text, token ids, or a list of either", name)
    given = list(prompts)
    ids = [one for one in given if isinstance(one, int)]
    several = [one for one in given if not isinstance(one, int)]
    if ids and several:
        raise InvalidParameter(f"{name} holds token ids and prompts: give a list of either", name)
    return [ids] if ids else several


def _params_of_each(given: SamplingParams | Iterable[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """For each of `count` prompts. Raises InvalidParameter unless they are as many."""
    name = "sampling_params"
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    each = list(given) if isinstance(given, Iterable) else [given]
    if strange := [one for one in each if not isinstance(one, SamplingParams)]:
        raise InvalidParameter(f"{name} holds {strange[0]!r:.80}, which is no SamplingParams", name)
    if len(each) != count:
        raise InvalidParameter(f"{count} prompts came with {len(each)} {name}", name)
    return each


def _close(engine: Engine, owner: int) -> None:
    """In the process that opened it: workers do not end with a fork."""
    if os.getpid() == owner:
        engine.close()

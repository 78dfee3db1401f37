"""What every way in has in common: check, render, tokenize, dispatch; and at the end, the metrics and one line of
log."""

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from quire_engine.config import EngineConfig
from quire_engine.errors import (
    ContextTooLong,
    InvalidParameter,
    ModelError,
    Unavailable,
)
from quire_engine.multimodal.processor import ImageProcessor
from quire_engine.pooling import Pooling, pooling_of
from quire_engine.request import check_length
from quire_engine.text.formats.chat import Answer, ChatFormat, ToolUse
from quire_engine.text.images import expand, parts_of, spans_of
from quire_engine.text.output import OutputText
from quire_engine.text.params import SamplingParams, TokenSampling
from quire_engine.text.tokenizer import LARGE_TEXT, Tokenizer, end_tokens
from quire_engine.waiting import WaitsFor
from quire_engine.weights.resolve import ModelFiles
from quire_engine.weights.text_parts import takes_images

from quire_cluster.config import ParserConfig
from quire_cluster.deployment import Deployment
from quire_cluster.gateway.dispatcher import Dispatcher
from quire_cluster.gateway.endings import count
from quire_cluster.gateway.generation import Call, Emitted, Generation, RequestFacts
from quire_cluster.gateway.governed import admit, put_on_record
from quire_cluster.gateway.images import NO_IMAGES, Images, SeenImages, without_triton
from quire_cluster.gateway.media import Media
from quire_cluster.gateway.policing import OutputCheck, check_exactness
from quire_cluster.gateway.sessions import ReplicaSession
from quire_cluster.gateway.texts import Texts
from quire_cluster.governance.callers import Caller
from quire_cluster.governance.checks.policing import InputCheck, Policing
from quire_cluster.governance.governor import Governor
from quire_cluster.governance.identity import calling
from quire_cluster.governance.limits import Permit
from quire_cluster.observability.metrics import Metrics, ModelMetrics
from quire_cluster.reports import ModelReport, ReplicaReport, WaitingRequest
from quire_cluster.routing_table import RoutingTable

log = logging.getLogger(__name__)
_STALL = 10.0  # seconds a busy engine may go without a step before it counts as hung
_SILENCE = 5.0  # seconds a replica may go without a report


class Service:
    """One model, as clients see it."""

    def __init__(
        self,
        files: ModelFiles,
        tokenizer: Tokenizer,
        *,
        names: list[str],
        parsers: ParserConfig | None = None,
        max_model_len: int = 0,
        max_waiting: int,
        metrics: Metrics,
        pooling: Pooling | None = None,
        images: Images | None = None,
    ) -> None:
        """`max_model_len`: until a table says it. `max_waiting`: requests that wait while there is no replica.
        `pooling`: of a model that gives vectors or scores instead of tokens. `images`: of one that takes some."""
        self.tokenizer = tokenizer
        self.texts = Texts(tokenizer)
        parsers = parsers or ParserConfig()
        self.chat_format = ChatFormat(
            tokenizer,
            tool_parser=parsers.tool_call_parser,
            reasoning_parser=parsers.reasoning_parser,
            auto=parsers.enable_auto_tool_choice,
        )
        log.info("%s: calls and reasoning are read as %s", names[0], self.chat_format.name)
        self.pooling = pooling
        self.images = images
        self.names = names
        self.max_model_len = max_model_len
        self.digests = {"model_digest": files.digest, "engine_digest": ""}  # for the record
        self.vocab_size: int = files.config["vocab_size"]
        self.vector_size: int = files.config.get("hidden_size") or 0  # numbers of an embedding
        self.metrics = ModelMetrics(metrics, names[0])
        self.dispatcher = Dispatcher(self._on_load, self._on_steps, max_waiting=max_waiting)
        self.dispatcher.on_gone = lambda slot: self.metrics.engine_gone(str(slot))
        self.governor: Governor | None = None  # puts requests on record
        self.draining = False
        self._open: set[Generation] = set()  # whose answer is not yet with the client, as far as we see
        self.num_generated = 0  # tokens of those that have ended
        self._end_tokens = end_tokens(files, tokenizer)
        self._pooled = SamplingParams(max_tokens=1, temperature=0.0).in_tokens(
            tokenizer, vocab_size=self.vocab_size, end_tokens=self._end_tokens
        )

    @staticmethod
    def load(
        files: ModelFiles,
        config: EngineConfig,
        *,
        names: list[str],
        chat_template: str | None,
        metrics: Metrics,
        media: Media | None = None,
        parsers: ParserConfig | None = None,
    ) -> "Service":
        """`media`: fetches what images are named by; without it none are taken. Raises ModelError for a tokenizer that
        cannot be loaded."""
        images, pooling = None, pooling_of(files, config.task)
        if media is not None and pooling is None and takes_images(files.config) and config.images_per_prompt:
            try:
                with without_triton():
                    images = Images(ImageProcessor.load(files), media, config.images_per_prompt)
            except ModelError as error:
                log.warning("%s takes no images: %s", names[0], error)
        tokenizer = Tokenizer.load(files, other=config.tokenizer, chat_template=chat_template)
        return Service(
            files,
            tokenizer,
            names=names,
            parsers=parsers,
            max_waiting=config.max_num_queued_reqs,
            metrics=metrics,
            pooling=pooling,
            images=images,
        )

    @property
    def num_open(self) -> int:
        """Requests whose answer is not yet with the client, as far as we see."""
        return len(self._open)

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests are served."""
        return not self.draining and bool(self.dispatcher.sessions)

    @property
    def trouble(self) -> str:
        """What is wrong with the replicas, for whoever would start this server again; "" while all is well.

        While the first one starts all is well; then each has to report, and its step counter to move unless it is idle.
        """
        dispatcher = self.dispatcher
        if not dispatcher.started:
            return ""
        if not dispatcher.sessions:
            return "no replica"
        if dispatcher.overdue:
            return f"gone: replica {', '.join(map(str, sorted(dispatcher.overdue)))}"
        for session in dispatcher.sessions:
            if session.silence.seconds > _SILENCE:
                return f"silent: replica {session.entry.slot}"
            if session.load.busy and session.load.step_age > _STALL:
                return f"stalled: replica {session.entry.slot}"
        return ""

    def follow(self, table: RoutingTable, deployment: Deployment) -> None:
        """What the controller says of its replicas, and what clients may call it."""
        self.names = list(deployment.names)
        self.digests["engine_digest"] = deployment.engine_revision
        self.dispatcher.update_table(table)
        if table.failure is not None:
            self.dispatcher.give_up("no replica of this model can be started")
        if context := min((entry.max_model_len for entry in table.replicas), default=table.max_model_len):
            # An engine that pools has one place more, for the token that it does not generate.
            self.max_model_len = context - (self.pooling is not None)

    def report(self) -> ModelReport:
        """For the controller."""
        waiting = self.dispatcher.homeless
        return ModelReport(
            replicas=tuple(_reported(session) for session in self.dispatcher.sessions),
            at_gateway=len(waiting),
            at_gateway_for=self.dispatcher.homeless_for,
            tokens_at_gateway=sum(len(choice.facts.prompt) + len(choice.output) for choice in waiting),
            generated=self.num_generated + sum(one.num_output_tokens for one in self._open),
        )

    async def why(self, deployment: str, request_id: str) -> list[WaitingRequest]:
        """What a request waits for, answer by answer; of all that wait, for ""."""
        asked = [one for one in self._open if not request_id or one.facts.request_id == request_id]
        found = await asyncio.gather(*(self.dispatcher.why(generation) for generation in asked))
        return [
            WaitingRequest(
                request_id=generation.facts.request_id,
                deployment=deployment,
                index=one.index,
                reason=one.reason,
                since=one.since,
                estimate=self.dispatcher.ready_in if one.reason == WaitsFor.REPLICA.value else one.estimate,
                tokens=one.tokens,
            )
            for generation, choices in zip(asked, found, strict=True)
            for one in choices
            if request_id or one.reason
        ]

    def _on_load(self, session: ReplicaSession) -> None:
        self.metrics.engine_load(str(session.entry.slot), session.load)

    def _on_steps(self, sizes: list[int]) -> None:
        for size in sizes:
            self.metrics.step_tokens.observe(size)

    # ---- requests -------------------------------------------------------------------------------------------------

    def check_generates(self) -> None:
        """Raises InvalidParameter for a model that gives vectors or scores."""
        if self.pooling is not None:
            raise InvalidParameter(
                f"this model gives {'scores' if self.pooling.scores else 'embeddings'}, not text; call "
                f"{'/v1/rerank or /v1/score' if self.pooling.scores else '/v1/embeddings or Embed'}",
                "model",
            )

    # ---- policies -------------------------------------------------------------------------------------------------

    @property
    def policing(self) -> Policing | None:
        """None: nothing is looked at."""
        return self.governor.policing if self.governor is not None else None

    def input_check(self) -> InputCheck | None:
        """Of what whoever calls sends; None: it is taken as it is."""
        if self.policing is None:
            return None
        rules = self.policing.rules(calling(), self.names[0])
        return InputCheck(rules, self.policing.asking("")) if rules.checks_input else None

    def _police(self, generation: Generation, params: SamplingParams) -> None:
        """Has policies look at what is answered. Raises InvalidParameter."""
        if self.policing is None or self.pooling is not None:
            return
        facts = generation.facts
        rules, asking = self.policing.rules(facts.caller, self.names[0]), self.policing.asking(facts.request_id)
        filters = [rules.output(asking) for _ in generation.choices]
        checks = [OutputCheck(one) for one in filters if one is not None]
        if checks:
            check_exactness(params)
            generation.checks = checks
            generation.on_stop = self.dispatcher.stop

    async def tokenize(self, text: str) -> list[int]:
        """A prompt's token ids. Raises ContextTooLong for one far beyond the context."""
        [tokens] = await self.tokenize_all([text])
        return tokens

    async def tokenize_all(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        parameter: str = "prompt",
        check: InputCheck | None = None,
    ) -> list[list[int]]:
        """The same for several. The first that is too long is told."""
        if check is not None:
            texts = [await check.text(text) for text in texts]
        return await self.texts.prompts(
            texts, context=self.max_model_len, add_special_tokens=add_special_tokens, parameter=parameter
        )

    async def prompt(
        self, text: str, files: list[bytes], salt: bytes, check: InputCheck | None = None
    ) -> tuple[list[int], SeenImages]:
        """A text's token ids, with images in its places for them; `salt`: under which these are kept. Raises
        InvalidParameter, ContextTooLong."""
        if check is not None:
            text = await check.text(text)
        if not files:
            return await self.tokenize(text), NO_IMAGES
        if self.images is None:
            raise InvalidParameter("the model takes no images; leave them out", "images")
        processor = self.images.processor
        parts = [{"type": "image", "image": file} for file in files]
        [message] = await self.images.found([{"role": "user", "content": parts}], salt)
        seen = tuple(part["image"] for part in message["content"])
        tokens = await self.tokenize(expand(text, seen, processor.placeholder))
        return tokens, SeenImages(spans_of(tokens, seen, processor.image_token_id), seen)

    async def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
        salt: bytes = b"",
        check: InputCheck | None = None,
    ) -> tuple[list[int], SeenImages]:
        """A conversation's prompt, and the images in it. `salt`: under which these are kept."""
        if check is not None:
            messages, tools = await check.everything(messages), await check.everything(tools)
        images = self.images
        if images is not None:
            messages = await images.found(messages, salt)
        seen = [part["image"] for _, part in parts_of(messages)] if images is not None else []
        tokens = await self.texts.conversation(
            messages,
            context=self.max_model_len,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables or {},
            tools=tools,
            placeholder=images.processor.placeholder if images is not None and seen else "",
        )
        if images is None or not seen:
            return tokens, NO_IMAGES
        return tokens, SeenImages(spans_of(tokens, seen, images.processor.image_token_id), tuple(seen))

    async def sampling(self, params: SamplingParams, answer: Answer | None = None) -> TokenSampling:
        """What `start` takes: made once for a call, however many prompts it has. `answer`: to a conversation. Raises
        InvalidParameter."""
        return await self.texts.sampling(params, vocab_size=self.vocab_size, end_tokens=self._end_tokens, answer=answer)

    async def answer(
        self, prompt: Sequence[int], use: ToolUse, params: SamplingParams, *, continued: str | None = None
    ) -> Answer:
        """How answers to a conversation with this prompt are guided and read. Raises InvalidParameter."""
        structure, budget = params.structured_outputs, params.thinking_token_budget

        def work() -> Answer:
            return self.chat_format.answer(prompt, use, structure, thinking_budget=budget, continued=continued)

        large = bool(use.tools) or structure is not None or len(continued or "") >= LARGE_TEXT
        return await asyncio.to_thread(work) if large else work()

    async def admit(
        self, caller: Caller, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None
    ) -> Permit | None:
        """Lets a call in by its tenant's limits; None: there are none. See `governed.admit`."""
        if self.governor is None or not prompts:
            return None
        self.governor.check()
        return await admit(self.governor.limiter, caller.tenant, prompts, params, self.max_model_len)

    def start(
        self,
        prompt: list[int],
        sampling: TokenSampling,
        call: Call,
        *,
        seen: SeenImages = NO_IMAGES,
        policed: bool = True,
    ) -> Generation:
        """Checks what is left to check and sends it off. `policed`: policies look at the answer. Raises RequestError or
        Unavailable."""
        check_length(len(prompt), sampling.params.max_tokens, self.max_model_len)
        generation = self._made(prompt, sampling, call, seen)
        if policed:
            self._police(generation, sampling.params)
        return self._send(generation)

    async def resume(
        self,
        prompt: list[int],
        sampling: TokenSampling,
        emitted: Mapping[int, Emitted],
        call: Call,
        *,
        seen: SeenImages = NO_IMAGES,
    ) -> Generation:
        """`start`, where the client holds a part of the answer, which another gateway began: by choice, `emitted`."""
        check_length(len(prompt), sampling.params.max_tokens, self.max_model_len)
        if sampling.params.seed is None and sampling.params.temperature > 0:
            raise InvalidParameter(
                "resume wants the seed that the answer was begun with, as what comes next depends on it; send a seed "
                "from the start, or temperature = 0",
                "seed",
            )
        for one in emitted.values():
            self._check_tokens(one.tokens, "resume")
        generation = self._made(prompt, sampling, call, seen)
        self._police(generation, sampling.params)
        if generation.checks:
            raise InvalidParameter(
                "answers are under a policy here, which has to see all of one: it cannot be gone on with; send the "
                "request anew",
                "resume",
            )
        await asyncio.to_thread(generation.resume, emitted)
        return self._send(generation)

    def pool(self, prompt: list[int], call: Call, *, scores: bool) -> Generation:
        """Sends a text off whose vector (or score) is wanted. Raises RequestError or Unavailable."""
        if self.pooling is None or self.pooling.scores != scores:
            kind = "text" if self.pooling is None else "scores" if self.pooling.scores else "embeddings"
            raise InvalidParameter(
                f"this model gives {kind}, not {'scores' if scores else 'embeddings'}"
                + ("; start the server with --task embed to have it give those" if kind == "text" else ""),
                "model",
            )
        if len(prompt) > self.max_model_len:
            raise ContextTooLong(
                f"an input has {len(prompt)} tokens; the context is {self.max_model_len}; shorten it", "input"
            )
        return self._send(self._made(prompt, self._pooled, call, NO_IMAGES))

    def _made(self, prompt: list[int], sampling: TokenSampling, call: Call, seen: SeenImages) -> Generation:
        if self.draining:
            raise Unavailable("this server is shutting down; try another one")
        if not prompt:
            raise InvalidParameter("the prompt has no tokens", "prompt")
        self._check_tokens(prompt, "prompt")
        params = sampling.params
        seed = params.seed if params.seed is not None else random.getrandbits(63)
        room = max(1, self.max_model_len - len(prompt))
        if call.longest_answer is not None:
            room = min(room, call.longest_answer)
        samplings = sampling.choices(room=room, seed=seed)
        facts = RequestFacts(
            request_id=call.request_id or uuid.uuid4().hex,
            prompt=prompt,
            priority=call.priority,
            deadline=call.deadline,
            cache_salt=call.caller.tenant.salt(call.cache_salt),
            arrival=time.monotonic(),
            seen=seen,
            route=call.route,
            verdicts=call.verdicts,
            user=call.user,
            caller=call.caller,
        )
        return Generation(
            facts, samplings, [OutputText(self.tokenizer, params, prompt, sampling.answer) for _ in samplings]
        )

    def _send(self, generation: Generation) -> Generation:
        self.dispatcher.submit(generation)
        generation.on_end = self._on_end
        self._open.add(generation)
        return generation

    def _check_tokens(self, tokens: Sequence[int], name: str) -> None:
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise InvalidParameter(f"the {name} holds a token id outside 0 to {self.vocab_size - 1}", name)

    # ---- endings --------------------------------------------------------------------------------------------------

    def _on_end(self, generation: Generation) -> None:
        """On record, before the client is told."""
        if self.governor is not None:
            digests = self.digests | ({"policies_digest": self.policing.digest} if self.policing is not None else {})
            put_on_record(self.governor, generation, self.names[0], digests, self.tokenizer.decode)

    def finished(self, generation: Generation) -> None:
        """The one place where a request ends for the gateway: aborts what is left, counts, and writes its line."""
        self.dispatcher.abort(generation)
        generation.end()
        self._open.discard(generation)
        self.num_generated += generation.num_output_tokens
        count(self.metrics, generation, time.monotonic())


def _reported(session: ReplicaSession) -> ReplicaReport:
    load = session.load
    return ReplicaReport(
        key=session.key,
        age=session.silence.seconds,
        running=load.running,
        waiting=load.waiting,
        queued_tokens=load.queued_tokens,
        prefill_rate=load.prefill_rate,
        computed=max(0, load.prefix_queries - load.prefix_hits),
        pages_used=load.pages_used,
        pages_total=load.pages_total,
        rows=load.rows,
        waiting_for=dict(load.waiting_for),
    )

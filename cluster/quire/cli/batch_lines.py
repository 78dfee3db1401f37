"""The lines of a batch file: what each asks for, and what is written for it."""

import time
import uuid
from typing import Any

import orjson
from quire_cluster.gateway import pooling
from quire_cluster.gateway.bodies import validated
from quire_cluster.gateway.chat import whole_message
from quire_cluster.gateway.http import error_body, http_status
from quire_cluster.gateway.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
)
from quire_engine.errors import InvalidParameter, QuireError
from quire_engine.step import Floats
from quire_engine.text.params import TokenSampling

from quire.llm import LLM, Completion, RequestOutput
from quire.pictures import OfflineImage

_CHAT, _TEXT, _EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_SCORE, _RERANK = "/v1/score", ("/v1/rerank", "/v2/rerank", "/rerank")
_UNSUPPORTED = ("stream", "logprobs", "top_logprobs", "prompt_logprobs", "echo", "return_token_ids")


class Line:
    """One line: what to run, or why it cannot be; then what came of it."""

    def __init__(self, number: int) -> None:
        self.custom_id = f"line-{number}"
        self.error: QuireError | None = None
        self.prompt: list[int] = []  # of a line that generates
        self.images: tuple[OfflineImage, ...] = ()  # of that prompt
        self.sampling: TokenSampling  # of that
        self.inputs: list[list[int]] = []  # of one that asks for vectors or scores
        self._body: dict[str, Any] = {}

    def read(self, llm: LLM, data: bytes) -> None:
        """Raises QuireError for what cannot be run."""
        try:
            entry = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise InvalidParameter(f"the line is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise InvalidParameter("the line needs an object with custom_id, url and body", "body")
        name = entry.get("custom_id")
        if not isinstance(name, str | None):
            raise InvalidParameter("custom_id is not text", "custom_id")
        self.custom_id = name or self.custom_id
        if not isinstance(entry.get("body"), dict):
            raise InvalidParameter("the line needs an object with custom_id, url and body", "body")
        url, body = entry.get("url"), entry["body"]
        served = (_CHAT, _TEXT) if llm.pooling is None else (_EMBED, _SCORE, *_RERANK)
        if url not in served:
            raise InvalidParameter(f"url is {url!r:.100}; with this model {', '.join(served)} are served", "url")
        if url in (_CHAT, _TEXT):
            for parameter in _UNSUPPORTED:
                if body.get(parameter) is not None and body[parameter] is not False:  # 0 log-probabilities are some
                    raise InvalidParameter(f"{parameter} is not supported in batches; leave it out", parameter)
            self._read_prompt(llm, url, body)
        elif url == _EMBED:
            self._read_inputs(llm, validated(EmbeddingRequest, body))
        elif url == _SCORE:
            score = validated(ScoreRequest, body)
            self._read_pairs(llm, pooling.score_pairs(score))
            self._answer = lambda values: pooling.score_answer(score.model or "", values, self._usage())
        else:
            rerank = validated(RerankRequest, body)
            self._read_pairs(llm, pooling.rerank_pairs(rerank))
            self._answer = lambda values: pooling.rerank_answer(rerank, rerank.model or "", values, self._usage())

    def _read_prompt(self, llm: LLM, url: str, content: dict[str, Any]) -> None:
        tokenizer = llm.tokenizer
        self._chat = url == _CHAT
        if self._chat:
            chat = validated(ChatCompletionRequest, content)
            params, self._model = chat.sampling(), chat.model or ""
            use = chat.tool_use()
            turns = llm.images.in_conversation([message.for_template() for message in chat.messages])
            text = tokenizer.render(
                turns,
                add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
                variables=chat.template_variables(tokenizer.template_variables),
                tools=chat.tools,
            )
            text, self.images = llm.images.rendered(text, turns)
            self.prompt = tokenizer.encode(text, add_special_tokens=False)
            with chat.structure_named():
                answer = llm.chat_format.answer(
                    self.prompt,
                    use,
                    params.structured_outputs,
                    thinking_budget=params.thinking_token_budget,
                    continued=chat.messages[-1].text if chat.continue_final_message else None,
                )
                self.sampling = llm.sampling(params, answer)
        else:
            body = validated(CompletionRequest, content)
            params, self._model = body.sampling(), body.model or ""
            self.sampling = llm.sampling(params)
            if isinstance(body.prompt, str):
                self.prompt = tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
            else:
                self.prompt = [token for token in body.prompt if isinstance(token, int)]
                if len(self.prompt) < len(body.prompt):
                    raise InvalidParameter("a batch line takes one prompt: a text or token ids", "prompt")
        llm.check(self.prompt, params)

    def _read_inputs(self, llm: LLM, body: EmbeddingRequest) -> None:
        if llm.pooling is not None and llm.pooling.scores:
            raise InvalidParameter("this model gives scores, not embeddings", "url")
        given = body.inputs()
        pooling.check_count(len(given))
        self._set_inputs(llm, [llm.tokenizer.encode(one) if isinstance(one, str) else one for one in given])
        self._finish = lambda vectors: {
            "object": "list",
            "data": pooling.embedding_objects(vectors, body),
            "model": body.model or "",
            "usage": self._usage(),
        }

    def _read_pairs(self, llm: LLM, pairs: list[tuple[str, str]]) -> None:
        pooling.check_pairs(len(pairs))
        if llm.pooling is not None and llm.pooling.scores:
            self._set_inputs(llm, llm.tokenizer.encode_pairs(pairs))
            self._finish = lambda vectors: self._answer([float(vector[0]) for vector in vectors])
        else:
            texts = list(dict.fromkeys(text for pair in pairs for text in pair))
            self._set_inputs(llm, llm.tokenizer.encode_all(texts))
            self._finish = lambda vectors: self._answer(pooling.cosines(pairs, texts, vectors))

    def _set_inputs(self, llm: LLM, inputs: list[list[int]]) -> None:
        for tokens in inputs:
            llm.check_text(tokens)
        self.inputs = inputs

    def fail(self, error: QuireError) -> None:
        """It costs this line alone."""
        self.error = error

    def take(self, output: RequestOutput) -> None:
        """What was generated. An answer without one of its choices is none."""
        self.error = next((one.error for one in output.outputs if one.error is not None), None)
        choices: list[dict[str, Any]] = []
        for completion in output.outputs:
            shown = {"message": _message(completion)} if self._chat else {"text": completion.text}
            choices.append(
                {"index": completion.index, "finish_reason": completion.finish_reason, "logprobs": None} | shown
            )
        generated = sum(len(completion.token_ids) for completion in output.outputs)
        reasoned = sum(completion.num_reasoning_tokens for completion in output.outputs)
        self._body = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": self._model,
            "choices": choices,
            "usage": {
                "prompt_tokens": len(self.prompt),
                "completion_tokens": generated,
                "total_tokens": len(self.prompt) + generated,
            }
            | ({"completion_tokens_details": {"reasoning_tokens": reasoned}} if reasoned else {}),
        }

    def take_vectors(self, vectors: list[Floats]) -> None:
        """One for each of the inputs."""
        try:
            self._body = self._finish(vectors)
        except QuireError as error:
            self.fail(error)

    def _usage(self) -> dict[str, int]:
        return pooling.usage(self.inputs)

    def result(self) -> dict[str, Any]:
        """The line of the output."""
        identity = f"batch_req_{uuid.uuid4().hex}"
        status = 200 if self.error is None else http_status(self.error)
        body = self._body if self.error is None else error_body(self.error, status)
        response = {"status_code": status, "request_id": identity, "body": body}
        return {"id": identity, "custom_id": self.custom_id, "error": None, "response": response}


def _message(completion: Completion) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in completion.tool_calls
    ]
    return whole_message(completion.text, completion.reasoning, calls)


def line_of(llm: LLM, data: bytes, number: int) -> Line:
    """Read, with its error where it has one."""
    line = Line(number)
    try:
        line.read(llm, data)
    except QuireError as error:
        line.fail(error)
    return line

"""POST /v1/chat/completions"""

import asyncio
from collections.abc import Sequence
from typing import Any

from quire_engine.step import TokenLogprobs
from quire_engine.text.formats.chat import ToolUse
from quire_engine.text.output import CallPart
from quire_engine.text.params import TokenSampling

from quire_cluster.gateway.endpoint import Endpoint, joined, prompt_logprobs
from quire_cluster.gateway.generation import Delta, Generation
from quire_cluster.gateway.schema import ChatCompletionRequest


class ChatCompletions(Endpoint):
    """POST /v1/chat/completions"""

    route = "/v1/chat/completions"
    _body: ChatCompletionRequest
    _use: ToolUse

    async def _prompts(self) -> list[list[int]]:
        body = self._body
        self._use = await asyncio.to_thread(body.tool_use) if body.tools else body.tool_use()
        messages = [message.for_template() for message in body.messages]
        prompt, self._seen = await self._service.render(
            messages,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            variables=body.template_variables(self._service.tokenizer.template_variables),
            tools=body.tools,
            salt=self._caller.tenant.salt(body.cache_salt),
            check=self._check,
        )
        for message in body.messages:
            message.forget_images()
        return [prompt]

    async def _sampling(self, prompts: list[list[int]]) -> TokenSampling:
        continued = self._body.messages[-1].text if self._body.continue_final_message else None
        with self._body.structure_named():
            answer = await self._service.answer(prompts[0], self._use, self._params, continued=continued)
            return await self._service.sampling(self._params, answer)

    def _envelope(self, *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        identity = f"chatcmpl-{self._generations[0].facts.request_id}"
        return {"id": identity, "object": kind, "created": self._created, "model": self._model}

    def _echo(self) -> str:
        return self._body.messages[-1].text if self._body.echo else ""

    def _opening(self, generation: Generation, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": self._echo()}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: list[int], scores: list[TokenLogprobs]) -> dict[str, Any] | None:
        if self._params.logprobs is None:
            return None
        return {
            "content": [self._one(token, score) for token, score in zip(tokens, scores, strict=True)],
            "refusal": None,
        }

    def _one(self, token: int, score: TokenLogprobs) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            written = self._service.tokenizer.token_bytes(token)
            return {"token": self._token(token), "logprob": value, "bytes": list(written)}

        pairs = zip(score.top_ids[0].tolist(), score.top_logprobs[0].tolist(), strict=True)
        return entry(token, float(score.logprobs[0])) | {"top_logprobs": [entry(t, v) for t, v in pairs]}

    def _chunk_choice(self, index: int, delta: Delta) -> dict[str, Any] | None:
        shown = delta.shown
        if not (shown or delta.finish_reason or self._params.logprobs is not None or self._body.return_token_ids):
            return None
        told: dict[str, Any] = {"content": shown.content} if shown.content else {}
        if shown.reasoning:
            told["reasoning_content"] = told["reasoning"] = shown.reasoning
        if shown.calls:
            told["tool_calls"] = [self._call_part(index, part) for part in shown.calls]
        choice: dict[str, Any] = {
            "index": index,
            "delta": told,
            "logprobs": self._logprobs(delta.token_ids, delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason:
            choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _whole_choice(self, index: int, generation: Generation, parts: list[Delta]) -> dict[str, Any]:
        text, tokens, _, scores = joined(parts)
        calls = self._calls(index, [part for delta in parts for part in delta.shown.calls])
        reasoning = "".join(delta.shown.reasoning for delta in parts)
        choice: dict[str, Any] = {
            "index": index,
            "message": whole_message(self._echo() + text, reasoning, calls),
            "logprobs": self._logprobs(tokens, scores),
            "finish_reason": parts[-1].finish_reason,
            "stop_reason": parts[-1].stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"], choice["prompt_token_ids"] = tokens, generation.facts.prompt
        if self._params.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(generation, self._token)
        return choice

    def _usage_details(self) -> dict[str, Any]:
        if not self._service.chat_format.reasons:
            return {}
        tokens = sum(generation.num_reasoning_tokens for generation in self._generations)
        return {"completion_tokens_details": {"reasoning_tokens": tokens}}

    def _call_part(self, index: int, part: CallPart) -> dict[str, Any]:
        """As OpenAI's clients put calls together: id, type and name in the first part of each, and arguments in all."""
        if part.name is None:
            return {"index": part.index, "function": {"arguments": part.arguments}}
        return {"index": part.index} | self._call(index, part.index, part.name, part.arguments)

    def _calls(self, index: int, parts: Sequence[CallPart]) -> list[dict[str, Any]]:
        names = [part.name for part in parts if part.name is not None]
        return [
            self._call(index, place, name, "".join(part.arguments for part in parts if part.index == place))
            for place, name in enumerate(names)
        ]

    def _call(self, index: int, place: int, name: str, arguments: str) -> dict[str, Any]:
        return {
            "id": self._generations[0].call_id(index, place),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


def whole_message(content: str, reasoning: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """As OpenAI's API has it. Reasoning goes by both of the field's names."""
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if reasoning:
        message["reasoning_content"] = message["reasoning"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message

"""POST /v1/chat/completions"""

from typing import Any

from quire_engine.step import TokenLogprobs

from quire_cluster.gateway.endpoint import Endpoint, joined, prompt_logprobs
from quire_cluster.gateway.generation import Delta, Generation
from quire_cluster.gateway.schema import ChatCompletionRequest


class ChatCompletions(Endpoint):
    """POST /v1/chat/completions"""

    route = "/v1/chat/completions"
    _body: ChatCompletionRequest

    async def _prompts(self) -> list[list[int]]:
        body = self._body
        messages = [message.for_template() for message in body.messages]
        return [
            await self._service.render(
                messages,
                add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
                continue_final_message=body.continue_final_message,
                variables=body.template_variables(self._service.tokenizer.template_variables),
            )
        ]

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

    def _chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": delta.text} if delta.text or not delta.finish_reason else {},
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
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": self._echo() + text, "refusal": None},
            "logprobs": self._logprobs(tokens, scores),
            "finish_reason": parts[-1].finish_reason,
            "stop_reason": parts[-1].stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"], choice["prompt_token_ids"] = tokens, generation.facts.prompt
        if self._params.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(generation, self._token)
        return choice

"""`quire run-batch`: OpenAI's batch file format, offline. One line in, one line out, in the same order."""

import time
import uuid
from pathlib import Path
from typing import Any

import orjson
from quire_cluster.gateway.http import error_body, http_status, validated
from quire_cluster.gateway.schema import ChatCompletionRequest, CompletionRequest
from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter, QuireError
from quire_engine.text.params import SamplingParams

from quire.cli.terminal import say
from quire.llm import LLM, RequestOutput

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_UNSUPPORTED = ("stream", "logprobs", "top_logprobs", "prompt_logprobs", "echo", "return_token_ids")


class _Entry:
    """One line of the input: what to run, or why it cannot be."""

    def __init__(self, llm: LLM, line: bytes, number: int) -> None:
        self.custom_id: str | None = None
        self.error: QuireError | None = None
        self.prompt: list[int] = []
        self.params = SamplingParams()
        self.model = ""
        try:
            self._read(llm, line)
        except QuireError as error:
            self.error = error
        self.custom_id = self.custom_id or f"line-{number}"

    def _read(self, llm: LLM, line: bytes) -> None:
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise InvalidParameter(f"the line is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("body"), dict):
            raise InvalidParameter("the line needs an object with custom_id, url and body", "body")
        if not isinstance(custom_id := entry.get("custom_id"), str | None):
            raise InvalidParameter("custom_id is not text", "custom_id")
        self.custom_id = custom_id
        self.url = entry.get("url")
        body = entry["body"]
        if self.url == _CHAT:
            chat = validated(ChatCompletionRequest, body)
            self.params, self.model = chat.sampling(), chat.model or ""
            prompt = llm.tokenizer.render(
                [message.for_template() for message in chat.messages],
                add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
                **(chat.chat_template_kwargs or {}),
            )
            self.prompt = llm.tokenizer.encode(prompt, add_special_tokens=False)
        elif self.url == _TEXT:
            text = validated(CompletionRequest, body)
            self.params, self.model = text.sampling(), text.model or ""
            if isinstance(text.prompt, str):
                self.prompt = llm.tokenizer.encode(text.prompt, add_special_tokens=text.add_special_tokens)
            elif text.prompt and all(isinstance(token, int) for token in text.prompt):
                self.prompt = list(text.prompt)  # type: ignore[arg-type]
            else:
                raise InvalidParameter("a batch line takes one prompt: a text or token ids", "prompt")
        else:
            raise InvalidParameter(f"url is {self.url!r}; served are {_CHAT} and {_TEXT}", "url")
        for name in _UNSUPPORTED:
            if body.get(name):
                raise InvalidParameter(f"{name} is not supported in batches; leave it out", name)
        llm.check(self.prompt, self.params)

    def result(self, output: RequestOutput | None) -> dict[str, Any]:
        """The line of the output."""
        line: dict[str, Any] = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": self.custom_id,
            "error": None,
        }
        failed = next((one.error for one in output.outputs if one.error is not None), None) if output else None
        if output is None or failed is not None:
            error = self.error or failed or QuireError("not run")
            status = http_status(error)
            return line | {
                "response": {
                    "status_code": status,
                    "request_id": line["id"],
                    "body": error_body(error, status),
                }
            }
        chat = self.url == _CHAT
        choices: list[dict[str, Any]] = []
        for completion in output.outputs:
            shown: dict[str, Any] = (
                {"message": {"role": "assistant", "content": completion.text}} if chat else {"text": completion.text}
            )
            choices.append(
                {"index": completion.index, "finish_reason": completion.finish_reason, "logprobs": None} | shown
            )
        generated = sum(len(completion.token_ids) for completion in output.outputs)
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.model,
            "choices": choices,
            "usage": {
                "prompt_tokens": len(self.prompt),
                "completion_tokens": generated,
                "total_tokens": len(self.prompt) + generated,
            },
        }
        return line | {"response": {"status_code": 200, "request_id": line["id"], "body": body}}


def run_batch(config: EngineConfig, source: str, target: str) -> None:
    """Runs every line that can be run; a line that cannot gets its error. Raises InvalidParameter for the files."""
    try:
        lines = [line for line in Path(source).read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise InvalidParameter(f"{source} cannot be read: {error.strerror}", "input") from error
    if not lines:
        raise InvalidParameter(f"{source} holds no requests", "input")
    _write(target, "ab", b"")  # what cannot be written is known before the work
    given = {name: value for name, value in vars(config).items() if name != "model"}
    with LLM(config.model, **given) as llm:
        entries = [_Entry(llm, line, number) for number, line in enumerate(lines, 1)]
        good = [entry for entry in entries if entry.error is None]
        outputs = llm.generate([entry.prompt for entry in good], [entry.params for entry in good]) if good else []
        results = dict(zip(map(id, good), outputs, strict=True))
        written = [orjson.dumps(entry.result(results.get(id(entry)))) for entry in entries]
    _write(target, "wb", b"\n".join(written) + b"\n")
    say(f"{len(good)} of {len(entries)} requests done, written to {target}")


def _write(target: str, mode: str, content: bytes) -> None:
    try:
        with open(target, mode) as file:
            file.write(content)
    except OSError as error:
        raise InvalidParameter(f"{target} cannot be written: {error.strerror}", "output") from error

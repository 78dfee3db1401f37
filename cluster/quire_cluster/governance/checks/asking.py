"""Policies of others, asked by HTTP or by chat: what is sent to them, and how their answers are read."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from quire_cluster.governance.checks.rules import JudgeRule, WebhookRule

log = logging.getLogger(__name__)

Stage = Literal["input", "output"]


class Unanswered(Exception):
    """There was no answer, or none that says yes or no. The message holds nothing of the text that was asked about."""


class Ask(Protocol):
    """How others are asked for one request. Both raise Unanswered or TimeoutError, `timeout` being in seconds."""

    @property
    def request_id(self) -> str:
        """The request's."""

    async def webhook(self, url: str, body: Mapping[str, object], timeout: float) -> Mapping[str, object]:
        """The JSON object that answers this one."""

    async def judge(self, model: str, prompt: str, timeout: float) -> str:
        """What a deployment answers to a conversation of this one message."""


@dataclass(frozen=True, slots=True)
class Answer:
    """To what was asked."""

    allowed: bool
    text: str | None = None  # what shall stand in place of what was held


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What a call is about. None of it is the text."""

    stage: Stage
    tenant: str
    model: str


async def asked(rule: WebhookRule | JudgeRule, about: About, text: str, held: int, ask: Ask) -> Answer | None:
    """What the rule's policy says of a text, whose last `held` characters are still held; None: nothing usable."""
    try:
        async with asyncio.timeout(rule.timeout):
            if isinstance(rule, JudgeRule):
                said = await ask.judge(rule.model, rule.prompt.replace("{text}", text), rule.timeout)
                return _verdict(said, rule.stop_on)
            body = {
                "text": text,
                "held": held,
                "stage": about.stage,
                "tenant": about.tenant,
                "model": about.model,
                "request_id": ask.request_id,
            }
            answer = _answer(await ask.webhook(rule.url, {"input": body}, rule.timeout))
            if answer.text is not None and rule.action != "redact":
                raise Unanswered(f"it sends a text, and the rule's action is {rule.action}; write `action: redact`")
            return answer
    except TimeoutError:
        log.warning("policy %s: no answer within %g s", rule.name, rule.timeout)
    except Unanswered as error:
        log.warning("policy %s: %s", rule.name, error)
    return None


def _verdict(said: str, stop_on: str) -> Answer:
    plain = said.strip().casefold()
    if not plain:
        raise Unanswered("the judge's answer is empty")
    return Answer(not plain.startswith(stop_on.strip().casefold()))


def _answer(body: Mapping[str, object]) -> Answer:
    """As OPA writes it: {"result": true}, or {"result": {"allow": true, "reason": "...", "text": "..."}}. A reason is
    for who reads the policy's own log: it may quote the text, so it goes no further."""
    result = body.get("result")
    if isinstance(result, bool):
        return Answer(result)
    if isinstance(result, dict) and result.keys() <= {"allow", "reason", "text"}:
        allow, reason, text = result.get("allow"), result.get("reason"), result.get("text")
        if isinstance(allow, bool) and isinstance(reason, str | None) and isinstance(text, str | None):
            return Answer(allow, text)
    raise Unanswered(
        'its answer is neither {"result": true}, {"result": false} nor {"result": {"allow": true or false}}, with '
        '"reason" and "text" as texts where they are there'
    )

"""Policies at work: on what calls send, with whoever is asked about it."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire_engine.errors import InvalidParameter, PolicyStop, QuireError

from quire_cluster.governance.callers import Caller
from quire_cluster.governance.checks.asking import Unanswered
from quire_cluster.governance.checks.filters import Verdict
from quire_cluster.governance.checks.policies import Policies, RuleSet
from quire_cluster.governance.checks.webhook import Webhooks

_UNREAD = ("role", "type", "image_url", "image", "id", "tool_call_id")  # of messages and tools: no texts of anybody's
Judge = Callable[[str, str], Awaitable[str]]


@dataclass(frozen=True)
class Asking:
    """How webhooks and judges are asked about one request."""

    request_id: str
    webhooks: Webhooks
    ask_model: Judge

    async def webhook(self, url: str, body: Mapping[str, object], timeout: float) -> Mapping[str, object]:
        """As `Webhooks.post`."""
        return await self.webhooks.post(url, body, timeout)

    async def judge(self, model: str, prompt: str, timeout: float) -> str:
        """What a deployment says. Raises Unanswered."""
        try:
            return await self.ask_model(model, prompt)
        except QuireError as error:
            raise Unanswered(f"{model} does not answer: {type(error).__name__}") from error


class Policing:
    """Of one gateway."""

    def __init__(self, policies: Policies, ask_model: Judge) -> None:
        """`ask_model`: asks a deployment a question."""
        self.digest = policies.digest
        self._policies = policies
        self._webhooks = Webhooks()
        self._ask_model = ask_model

    def rules(self, caller: Caller, model: str) -> RuleSet:
        """Those for its requests to a model, by the deployment's name."""
        return self._policies.for_(caller.tenant.name, model)

    def asking(self, request_id: str) -> Asking:
        """For one request."""
        return Asking(request_id, self._webhooks, self._ask_model)

    async def close(self) -> None:
        """Asks no more."""
        await self._webhooks.close()


class InputCheck:
    """What one call sends. `verdicts` grow with each text."""

    def __init__(self, rules: RuleSet, asking: Asking) -> None:
        self.verdicts: list[Verdict] = []
        self._rules = rules
        self._asking = asking

    async def text(self, text: str) -> str:
        """What becomes of it. Raises PolicyStop."""
        found = await self._rules.check_input(text, self._asking)
        self.verdicts += found.verdicts
        if found.stopped:
            rule = next(one.rule for one in reversed(found.verdicts) if one.action == "stop")
            raise PolicyStop(f"the policy {rule} refuses this request")
        return found.text

    def no_token_ids(self, parameter: str) -> None:
        """Raises InvalidParameter: they are no text that could be looked at."""
        why = f"{parameter} is under a policy here, which reads texts: send one in place of token ids"
        raise InvalidParameter(why, parameter)

    async def everything(self, value: Any) -> Any:
        """The same of every text in messages or tools."""
        if isinstance(value, str):
            return await self.text(value)
        if isinstance(value, list):
            return [await self.everything(one) for one in value]
        if isinstance(value, dict):
            return {name: one if name in _UNREAD else await self.everything(one) for name, one in value.items()}
        return value


def results(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Of an answer, by the rule, as Azure's OpenAI API has them."""
    found: dict[str, Any] = {}
    for one in verdicts:
        told = {"detected": True, "filtered": one.action != "flag", "action": one.action, "stage": one.stage}
        found.setdefault(one.rule, []).append(told | {"kind": one.kind, "count": one.count})
    return found

"""An operator's policies at a gateway: on what is answered."""

from dataclasses import replace

from quire_engine.errors import InvalidParameter
from quire_engine.text.output import CallPart, Shown
from quire_engine.text.params import SamplingParams

from quire_cluster.gateway.generation import Choice, Delta
from quire_cluster.governance.checks.filters import FINISH_REASON, OutputFilter, Piece, Verdict


class OutputCheck:
    """What one answer shows."""

    def __init__(self, filter: OutputFilter) -> None:
        self._filter = filter

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """So far."""
        return self._filter.verdicts

    async def take(self, choice: Choice, delta: Delta) -> Delta | None:
        """Of what is new what may be shown; None: nothing yet. Its tokens are not told: they are the text that is held
        back. Where a rule ends the answer, the choice has its ending then."""
        filter, shown = self._filter, delta.shown
        if filter.stopped:
            return None
        pieces: list[Piece] = []
        calls: list[CallPart] = []

        async def push(channel: str, text: str) -> list[Piece]:
            return await filter.push(channel, text) if text and not filter.stopped else []

        pieces += await push("reasoning", shown.reasoning)
        pieces += await push("content", shown.content)
        for part in shown.calls:
            if part.name is not None and not filter.stopped:
                calls.append(CallPart(part.index, part.name, ""))
            pieces += await push(f"call:{part.index}", part.arguments)
        if delta.finish_reason is not None and not filter.stopped:
            pieces += await filter.finish()
        texts = {"reasoning": "", "content": ""}
        for piece in pieces:
            kind, _, index = piece.channel.partition(":")
            if index:
                calls.append(CallPart(int(index), None, piece.text))
            else:
                texts[kind] += piece.text
        made = replace(delta, shown=Shown(calls=tuple(calls), **texts), token_ids=[], offsets=[], logprobs=[])
        if filter.stopped:
            choice.censor(FINISH_REASON)
            made = replace(made, finish_reason=FINISH_REASON, stop_reason=None, error=None)
        return made if made.shown or made.finish_reason is not None else None


def check_exactness(params: SamplingParams) -> None:
    """Raises InvalidParameter for what would tell the tokens of an answer that policies may hold back."""
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            why = f"answers are under a policy here, and {name} would tell their tokens; leave it out"
            raise InvalidParameter(why, name)

"""One choice's tokens becoming text: detokenized, read as reasoning, calls and content, and the content cut at stop
strings. Used by gateways and by offline batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from quire_engine.text.formats.chat import ALL_CONTENT, Answer
from quire_engine.text.formats.parser import Piece
from quire_engine.text.params import SamplingParams
from quire_engine.text.stops import StopMatcher
from quire_engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class CallPart:
    """What is new of a call. The first part of each has its name, and maybe a piece of its arguments."""

    index: int  # among the calls of this choice
    name: str | None
    arguments: str  # JSON text, or a piece of it


@dataclass(frozen=True, slots=True)
class Shown:
    """What a reader may be shown, in the order of a model's own: reasoning, content, calls."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallPart, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class OutputText:
    """Push tokens, `take` what may be shown; `stopped_by` names the stop string that ended it.

    The text goes on where the prompt's ends: both together are the text of all the tokens. A stop string counts within
    the content, once it ends after `min_tokens` tokens, wherever it begins.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int], answer: Answer = ALL_CONTENT
    ) -> None:
        """`answer`: how one to a conversation is read."""
        self._detokenizer = tokenizer.stream(
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            after=prompt,
        )
        self._matcher = StopMatcher(params.stop_strings, params.include_stop_str_in_output)
        self._parser = answer.parser()
        self._marks = answer.marks
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._content: list[str] = []
        self._pieces: list[Piece] = []
        self.num_calls = 0
        self.num_reasoning_tokens = 0
        self.stopped_by: str | None = None

    @property
    def length(self) -> int:
        """Characters of all tokens so far, shown or held back."""
        return self._detokenizer.length

    def push(self, token_id: int, is_stop_token: bool = False) -> None:
        """One more. A token that ended the output by itself adds no text."""
        self._num_tokens += 1
        parser = self._parser
        if parser is not None and parser.in_reasoning:
            self.num_reasoning_tokens += 1
        if is_stop_token:
            return
        if parser is None:
            self._show(self._detokenizer.step(token_id))
            return
        mark = self._marks.get(token_id)
        text = self._detokenizer.step(token_id) if mark is None else self._detokenizer.flush() + mark
        self._read(parser.push(text) if text else [])

    def finish(self) -> None:
        """What was held back, when the output ends for another reason than a stop string."""
        rest = self._detokenizer.flush()
        if self._parser is None:
            self._show(rest)
        else:
            self._read(self._parser.push(rest) + self._parser.finish() if rest else self._parser.finish())
        if self.stopped_by is None:
            self._content.append(self._matcher.flush())

    def take(self) -> Shown:
        """What is new since this was last asked."""
        content = "".join(self._content)
        self._content.clear()
        if not self._pieces:
            return Shown(content)
        pieces, self._pieces = self._pieces, []
        reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        return Shown(content, reasoning, self._calls(pieces))

    def _calls(self, pieces: Sequence[Piece]) -> tuple[CallPart, ...]:
        parts: list[CallPart] = []
        for piece in pieces:
            if piece.kind == "call":
                parts.append(CallPart(self.num_calls, piece.text, ""))
                self.num_calls += 1
            elif piece.kind == "arguments":
                index = self.num_calls - 1
                if parts and parts[-1].index == index:
                    parts[-1] = CallPart(index, parts[-1].name, parts[-1].arguments + piece.text)
                else:
                    parts.append(CallPart(index, None, piece.text))
        return tuple(parts)

    def _read(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if self.stopped_by is not None:
                break
            if piece.kind == "content":
                self._show(piece.text)
            else:
                self._pieces.append(piece)

    def _show(self, text: str) -> None:
        shown, self.stopped_by = self._matcher.push(text, ends=self._num_tokens > self._min_tokens)
        if shown:
            self._content.append(shown)

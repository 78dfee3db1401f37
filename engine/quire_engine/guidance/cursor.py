"""Where one output stands in what it has to look like: a replay of its tokens."""

from collections import deque
from collections.abc import Iterable
from copy import copy
from enum import Enum, auto
from typing import Any

from quire_engine.guidance.compiled import Guide


class _Phase(Enum):
    OPENING = auto()  # constrained content may begin, or thinking first
    THINKING = auto()
    BETWEEN = auto()  # thinking has ended, and constrained content is to come
    FREE = auto()
    SECTION = auto()  # a constrained part of free content
    CONTENT = auto()  # all of it is constrained
    ENDED = auto()


_BREAKS = 2  # tokens of line breaks that models may write where they have learnt to


class GrammarFailure(Exception):
    """A matcher gave up: too complex at this point, say."""


class Cursor:
    """Ask what may come (`matcher`, `only`, `besides`, `never`), then `advance` by what came. Not thread-safe."""

    def __init__(self, guide: Guide) -> None:
        self.guide, self._spec = guide, guide.spec
        self._vocabulary = guide.vocabulary
        thinking = guide.spec.thinking
        self._matcher: Any = None
        self._begun = 0  # tokens of the thinking's beginning that have come, while content may still begin
        self._thought = 0  # tokens of thinking so far
        self._closing = 0  # tokens that end it by force
        self._breaks = 0  # tokens of line breaks between it and the content
        self._sections = 0
        self._seen = _Tail(max(map(len, (guide.begin, guide.end, *(pattern for _, _, pattern, _ in guide.sections)))))
        self._written = 0  # tokens of free content
        self._text: int | None = None  # the first of them that is not blank
        self._phase = _Phase.FREE
        if thinking is not None and thinking.inside:
            self._phase = _Phase.THINKING
        elif guide.content is not None:
            self._begin_content()
            if thinking is not None and thinking.opening:
                self._phase = _Phase.OPENING

    # ---- what may come --------------------------------------------------------------------------------------------

    @property
    def matcher(self) -> Any:
        """Of llguidance, which knows what may come; None: there is none now."""
        return self._matcher

    @property
    def besides(self) -> tuple[int, ...]:
        """Tokens that may come beside what the matcher allows."""
        thinking = self._spec.thinking
        if self._phase is _Phase.BETWEEN and self._breaks < _BREAKS:
            return self._vocabulary.breaks
        if self._phase is not _Phase.OPENING or thinking is None:
            return ()
        return thinking.opening[self._begun : self._begun + 1]

    @property
    def only(self) -> tuple[int, ...] | None:
        """Without a matcher: the tokens that may come; None: all."""
        thinking = self._spec.thinking
        if self._phase is _Phase.ENDED:
            return self._vocabulary.ends
        if self._phase is _Phase.OPENING:
            return self.besides
        if self._phase is _Phase.THINKING and thinking is not None and thinking.budget is not None:
            return thinking.closing[self._closing : self._closing + 1] if self._thought >= thinking.budget else None
        return None

    @property
    def never(self) -> tuple[int, ...]:
        """Of all tokens, where all may come, those that may not: an output does not end before its content."""
        return self._vocabulary.ends if self._phase is _Phase.THINKING and self.guide.content is not None else ()

    @property
    def complete(self) -> bool:
        """Whether nothing but an end may come."""
        if self._phase is _Phase.ENDED:
            return True
        return self._phase is _Phase.CONTENT and bool(self._matcher.is_stopped())

    def fork(self) -> "Cursor":
        """Another one that stands here and goes its own way."""
        other = copy(self)
        other._seen = self._seen.copy()
        if self._matcher is not None:
            other._matcher = self._matcher.deep_copy()
        return other

    # ---- what came ------------------------------------------------------------------------------------------------

    def advance(self, token: int) -> None:
        """Raises GrammarFailure where a matcher gives up."""
        match self._phase:
            case _Phase.OPENING:
                self._open(token)
            case _Phase.THINKING:
                self._think(token)
            case _Phase.BETWEEN:
                if token in self.besides:
                    self._breaks += 1
                else:
                    self._phase = _Phase.CONTENT
                    self._consume(token)
            case _Phase.FREE:
                self._write(token)
            case _Phase.CONTENT:
                self._consume(token)
            case _Phase.SECTION:
                self._consume(token)
                if self._matcher.is_stopped():
                    self._end_section()
            case _Phase.ENDED:
                pass

    def _open(self, token: int) -> None:
        thinking = self._spec.thinking
        assert thinking is not None, "content may begin at once"
        if token != thinking.opening[self._begun]:
            self._phase = _Phase.CONTENT
            self._consume(token)
            return
        self._begun += 1
        if self._begun == len(thinking.opening):
            self._matcher, self._phase = None, _Phase.THINKING
        elif self._matcher is not None and not self._matcher.try_consume_tokens([token]):
            self._matcher = None

    def _think(self, token: int) -> None:
        thinking = self._spec.thinking
        assert thinking is not None, "there is thinking"
        if self.only is not None:
            self._closing += 1
        self._thought += 1
        self._seen.push(token, self._vocabulary.written(token))
        if self._seen.find(self.guide.end) is not None:
            self._seen.clear()
            self._text = None
            self._phase = _Phase.FREE
            if self.guide.content is not None:
                self._begin_content()
                self._phase = _Phase.BETWEEN
        elif self._vocabulary.delimiters:
            self._find_section(delimited=True)

    def _write(self, token: int) -> None:
        written = self._vocabulary.written(token)
        self._seen.push(token, written)
        self._written += 1
        if self._begins_thinking():
            self._seen.clear()
            self._closing, self._phase = 0, _Phase.THINKING
            return
        if self._text is None and written.strip():
            self._text = self._written - 1
        self._find_section(delimited=False)

    def _begins_thinking(self) -> bool:
        """A delimiter does wherever it stands, and again; words do where content begins."""
        thinking = self._spec.thinking
        if thinking is None or (found := self._seen.find(self.guide.begin)) is None:
            return False
        before, tokens = found
        return isinstance(thinking.begin[0], int) or not (before.strip() or self._is_text_before(len(tokens)))

    def _find_section(self, *, delimited: bool) -> None:
        """Whether a sign has come. `delimited`: of those alone that are no text."""
        begun = self._is_text_before(len(self._seen))
        for section, sign, pattern, start in self.guide.sections:
            if (delimited and not isinstance(sign[0], int)) or (section.only_first and begun):
                continue
            found = self._seen.find(pattern)
            if found is None:
                continue
            before, tokens = found
            if section.only_first and (before.strip() or self._is_text_before(len(tokens))):
                continue
            matcher = start.deep_copy()
            if matcher.try_consume_tokens(tokens) == len(tokens):  # else what follows is no such part: text
                self._matcher, self._phase = matcher, _Phase.SECTION
                self._seen.clear()
                if matcher.is_stopped():
                    self._end_section()
                return

    def _is_text_before(self, tokens: int) -> bool:
        """Whether something but space stands before the last so many tokens."""
        return self._text is not None and self._text < self._written - tokens

    def _end_section(self) -> None:
        self._sections += 1
        self._matcher = None
        self._text = None  # content begins anew
        ends = self._spec.then_end or self._sections >= self._spec.most
        self._phase = _Phase.ENDED if ends else _Phase.FREE

    def _begin_content(self) -> None:
        assert self.guide.content is not None, "the content is free"
        self._matcher, self._phase = self.guide.content.deep_copy(), _Phase.CONTENT

    def _consume(self, token: int) -> None:
        matcher = self._matcher
        if matcher.is_stopped() and not matcher.is_error() and token in self._vocabulary.ends:
            return  # the output goes on after its end, as min_tokens wants
        if not matcher.consume_token(token):
            raise GrammarFailure(matcher.get_error())


class _Tail:
    """The last tokens of free text, as many as a delimiter may be made of."""

    def __init__(self, longest: int) -> None:
        """`longest`: bytes of the longest delimiter."""
        self._longest = longest
        self._tokens: deque[tuple[int, bytes]] = deque()
        self._length = 0

    def push(self, token: int, written: bytes) -> None:
        tokens = self._tokens
        tokens.append((token, written))
        self._length += len(written)
        while len(tokens) > 1 and self._length - len(tokens[0][1]) >= self._longest + len(written):
            self._length -= len(tokens.popleft()[1])

    def __len__(self) -> int:
        return len(self._tokens)

    def copy(self) -> "_Tail":
        other = copy(self)
        other._tokens = self._tokens.copy()
        return other

    def find(self, pattern: bytes) -> tuple[bytes, list[int]] | None:
        """Whether the last token ends it: what its first token writes before it, and the tokens that it stands in."""
        if not pattern or not self._tokens:
            return None
        earlier = self._length - len(self._tokens[-1][1])
        place = b"".join(self._texts()).find(pattern, max(0, earlier - len(pattern) + 1))
        if place < 0:
            return None
        for number, (_, written) in enumerate(self._tokens):
            if place < len(written):
                return written[:place], [token for token, _ in list(self._tokens)[number:]]
            place -= len(written)
        raise AssertionError("found outside of the text")

    def clear(self) -> None:
        self._tokens.clear()
        self._length = 0

    def _texts(self) -> Iterable[bytes]:
        return (written for _, written in self._tokens)

"""Specs to what cursors start from, each made once however many requests have it."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock
from typing import Any

from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.guidance.grammars import compiled
from quire_engine.guidance.spec import GuidanceSpec, Marker, Section
from quire_engine.guidance.vocabulary import Vocabulary, marked

log = logging.getLogger(__name__)
_KEPT = 256  # compiled specs
_KEPT_SIZE = 4 << 20  # characters of them; a compiled one takes up to 200 bytes for each
_SMALL = 16 << 10  # characters of one that is compiled in milliseconds


class Guide:
    """A spec with its grammars compiled. Matchers are copied off those that it holds, which nobody advances."""

    def __init__(self, spec: GuidanceSpec, vocabulary: Vocabulary) -> None:
        """Raises InvalidParameter for a grammar that cannot be compiled."""
        started = time.monotonic()
        self.spec = spec
        self.vocabulary = vocabulary
        self.content = _matcher(spec.content, vocabulary) if spec.content else None
        self.sections: list[tuple[Section, Marker, bytes, Any]] = []  # for each sign; its bytes, its section's matcher
        for section in spec.sections:
            matcher = _matcher(section.grammar, vocabulary)
            self.sections += [(section, sign, _pattern(sign), matcher) for sign in section.signs]
        thinking = spec.thinking
        self.begin = _pattern(thinking.begin) if thinking is not None else b""
        self.end = _pattern(thinking.end) if thinking is not None else b""
        self.seconds = time.monotonic() - started  # that it took


class Guides:
    """The compiled specs of one worker. For any number of threads."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        """`vocabulary` may take its time: it is asked for once, in a thread, when it is first needed."""
        self._small = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-grammars")
        self._read = vocabulary
        self._vocabulary: Future[Vocabulary] | None = None
        self._made: OrderedDict[str, Future[Guide]] = OrderedDict()
        self._size = 0  # characters of these specs
        self._lock = RLock()

    def read_vocabulary(self) -> "Future[Vocabulary]":
        """Begins to, unless it has. The future raises ModelError."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._large.submit(_prepared, self._read)
            return self._vocabulary

    def prepare(self, spec: str) -> "Future[Guide]":
        """Compiles a spec in a thread, unless that is done or under way. The future raises InvalidParameter, or
        ModelError where the model's tokenizer has no use for grammars. A large one keeps no small one waiting."""
        with self._lock:
            made = self._made.get(spec)
            if made is not None and (made.cancelled() or (made.done() and made.exception() is not None)):
                self._forget(spec)
                made = None
            if made is None:
                pool = self._small if len(spec) <= _SMALL else self._large
                made = self._made[spec] = pool.submit(_compiled, spec, self.read_vocabulary())
                self._size += len(spec)
            self._made.move_to_end(spec)
            while len(self._made) > _KEPT or (self._size > _KEPT_SIZE and len(self._made) > 1):
                self._forget(next(iter(self._made)))
            return made

    def drop(self, spec: str, guide: Guide) -> None:
        """Forgets a compiled spec: copies of a matcher share what they learn, and what they have no more room for."""
        with self._lock:
            made = self._made.get(spec)
            if made is None or not made.done() or made.cancelled():
                return
            if made.exception() is None and made.result() is guide:
                self._forget(spec)

    def _forget(self, spec: str) -> None:
        del self._made[spec]
        self._size -= len(spec)

    def close(self) -> None:
        """Ends the threads once they are through."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)


def _compiled(spec: str, vocabulary: "Future[Vocabulary]") -> Guide:
    return Guide(GuidanceSpec.from_json(spec), vocabulary.result())


def _prepared(vocabulary: Callable[[], Vocabulary]) -> Vocabulary:
    found = vocabulary()
    try:
        _ = found.compiled
    except Exception as error:  # whatever llguidance makes of a tokenizer
        log.warning("outputs cannot be guided by grammars: %s", error)
        raise ModelError(
            f"this model's tokenizer cannot be used with grammars ({type(error).__name__}); leave tools, "
            "response_format and structured_outputs out"
        ) from error
    return found


def _matcher(grammar: str, vocabulary: Vocabulary) -> Any:
    matcher, problem = compiled(grammar, vocabulary.compiled, vocabulary.encode("{"))
    if problem:
        where = "structured_outputs, response_format or tools"
        raise InvalidParameter(f"the grammar of {where} cannot be used: {problem}")
    return matcher


def _pattern(marker: Marker) -> bytes:
    return b"".join(marked(part) if isinstance(part, int) else part.encode() for part in marker)

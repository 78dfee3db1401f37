"""Where the end of a log stood before, in itself or in another text."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FACTOR = 0x9E3779B97F4A7C15  # 2**64 by the golden ratio, odd: Fibonacci hashing (Knuth, volume 3, section 6.4)
_WRAP = 2**64 - 1
_MANY = 48  # tokens from which numpy is faster than a loop


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What is looked for, and how much of it."""

    short: int  # tokens that a place has to agree in
    long: int  # tokens looked for next, where the short run is common
    walk: int  # places looked at for each, the latest first
    reach: int  # tokens compared
    enough: int  # places that agree in `reach` tokens, after which no other is looked at


@dataclass(frozen=True, slots=True)
class Found:
    """The places that agree in the most tokens, the latest first. A place is the index of the token that follows."""

    places: list[int]
    length: int  # tokens they agree in; 0: none
    more: bool  # other places were not looked at


class Index:
    """Of a text that grows. It reads on when it is searched."""

    def __init__(self, bounds: Bounds) -> None:
        assert 0 < bounds.short <= bounds.long <= bounds.reach
        self._bounds = bounds
        self._short, self._long = _Chains(bounds.short), _Chains(bounds.long)

    def clear(self) -> None:
        """The text is another now."""
        self._short.clear()
        self._long.clear()

    def search(self, text: Sequence[int], log: list[int], index: "Index") -> Found:
        """Where `text` agrees with the end of `log`, of which `index` is."""
        found = self._short.search(text, log, index._short.key_of(log), self._bounds)
        if found.more:
            longer = self._long.search(text, log, index._long.key_of(log), self._bounds)
            return longer if longer.places else found
        return found


class _Chains:
    """Of each run of `gram` tokens the latest place, and of each place the one before it with the same run.

    The hash chains of LZ77 (RFC 1951, section 4), in 12 to 20 bytes a token. 0 is no place: nothing comes before it.
    Where many runs share a bucket, a search finds less; it never takes longer.
    """

    def __init__(self, gram: int) -> None:
        self._gram = gram
        self._powers = [pow(_FACTOR, age + 1, 2**64) for age in range(gram)]
        self.clear()

    def clear(self) -> None:
        self._key = 0  # of the last run read, which is not in the chains: nothing follows it yet
        self._resize(1024)

    def _resize(self, buckets: int) -> None:
        self._shift = 65 - buckets.bit_length()
        self._heads = array("i", bytes(4 * buckets))
        self._before = array("i")

    def key_of(self, text: Sequence[int]) -> int:
        """Of the run at its end. It may have grown since the last call."""
        if len(text) > len(self._before):
            self._read(text)
        return self._key

    def _read(self, text: Sequence[int]) -> None:
        if 2 * len(text) > len(self._heads):
            self._resize(1 << (2 * len(text)).bit_length())
        if len(text) - max(len(self._before), self._gram) >= _MANY:
            self._read_many(text)
        else:
            self._read_few(text)

    def _read_few(self, text: Sequence[int]) -> None:
        key, gram, heads, before = self._key, self._gram, self._heads, self._before
        for place in range(len(before), len(text)):
            if place < gram:
                before.append(0)
                key += text[place]
            else:
                bucket = key >> self._shift
                before.append(heads[bucket])
                heads[bucket] = place
                key += text[place] - text[place - gram] * self._powers[-1]
            key = key * _FACTOR & _WRAP
        self._key = key

    def _read_many(self, text: Sequence[int]) -> None:
        """What `_read_few` does."""
        first = max(len(self._before), self._gram)
        tokens = np.array(text[first - self._gram :], np.int64).astype(np.uint64)
        keys = np.zeros(len(text) - first + 1, np.uint64)
        for age, power in enumerate(self._powers):
            keys += tokens[self._gram - 1 - age : len(tokens) - age] * np.uint64(power)
        self._key = int(keys[-1])
        self._before.frombytes(bytes(4 * (len(text) - len(self._before))))
        heads, before = np.frombuffer(self._heads, np.int32), np.frombuffer(self._before, np.int32)
        # Sorted by bucket, and by place within it, each place comes after the one before it.
        places = np.arange(first, len(text))
        ordered = np.sort((keys[:-1] >> np.uint64(self._shift)).astype(np.int64) << 32 | places)
        buckets, places = ordered >> 32, ordered & 0xFFFFFFFF
        begins = np.diff(buckets, prepend=-1) != 0
        before[places] = np.where(begins, heads[buckets], np.roll(places, 1))
        ends = np.roll(begins, -1)
        heads[buckets[ends]] = places[ends]

    def search(self, text: Sequence[int], log: list[int], key: int, bounds: Bounds) -> Found:
        """Where `text` agrees with the end of `log`, which has this key."""
        self.key_of(text)
        recent = log[: -bounds.reach - 1 : -1]  # the latest token first
        length, places, looked = self._gram, list[int](), 0
        place = self._heads[key >> self._shift]
        for _ in range(4 * bounds.walk):  # other runs of the bucket are among them
            if not place or looked == bounds.walk:
                break
            start = place
            for token in recent:
                if not start or text[start - 1] != token:
                    break
                start -= 1
            looked += place - start >= self._gram
            if place - start > length:
                length, places = place - start, []
            if place - start == length:
                places.append(place)
                if length == bounds.reach and len(places) == bounds.enough:
                    return Found(places, length, more=False)
            place = self._before[place]
        return Found(places, length if places else 0, more=place > 0)

"""What a gateway believes of the caches of replicas: which blocks of tokens are where. Plain data; nobody is asked."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_BELIEF_BYTES = 400  # that one block at one replica takes here, at the most


@dataclass(frozen=True, slots=True)
class Prompt:
    """What routing looks at of a request: how many tokens it has, and a hash of every full block with all before it.

    The hashes are Python's own of bytes, keyed anew in every process, for they are compared in this one only. Where two
    prefixes meet by chance, a request takes a detour; what is cached is found by the engine, by hashes of its own.
    """

    tokens: int
    hashes: Sequence[int] = ()

    @staticmethod
    def of(tokens: list[int], salt: bytes, block_size: int) -> "Prompt":
        """`block_size` is in tokens; 0: not known yet, so no block is either."""
        raw, width = array("I", tokens).tobytes(), 4 * block_size
        hashes: list[int] = []
        previous = hash(salt)
        for at in range(0, len(raw) // width * width if width else 0, width or 1):
            previous = hash((previous, raw[at : at + width]))
            hashes.append(previous)
        return Prompt(len(tokens), hashes)


class PrefixMap:
    """Blocks and the replicas, by number, that are believed to have them; of each the least recently used go first.

    It is bounded in bytes. Every replica has the same share of them, so that none crowds out another, and no more
    blocks than its own cache has.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes // _BELIEF_BYTES  # blocks, each counted at every replica
        self._holders: dict[int, int] = {}  # hash → a bit for each replica that has the block
        self._blocks: dict[int, OrderedDict[int, None]] = {}  # replica → hashes, the oldest first

    def __len__(self) -> int:
        """Blocks, each counted at every replica that is believed to have it."""
        return sum(map(len, self._blocks.values()))

    def add(self, replica: int) -> None:
        """One more has a share, of which nothing is believed."""
        self._blocks[replica] = OrderedDict()
        for other in self._blocks:
            self._trim(other, self._share)

    def forget(self, replica: int) -> None:
        """It is gone, and its cache with it."""
        self._trim(replica, 0)
        del self._blocks[replica]

    def learn(self, replica: int, hashes: Sequence[int], most: int) -> int:
        """A prompt was sent there, so its blocks will be there: how many of them were believed to be. `most`: blocks
        that its cache has; 0: it has not said."""
        blocks, holders, bit = self._blocks[replica], self._holders, 1 << replica
        known = 0
        for block in reversed(hashes):  # so that a prefix outlives its continuations, as it does in the cache
            if block in blocks:
                blocks.move_to_end(block)
                known += 1
            else:
                blocks[block] = None
                others = holders.get(block)
                holders[block] = bit if others is None else others | bit
        self._trim(replica, min(self._share, most or self._share))
        return known

    def shrink(self, replica: int, count: int) -> None:
        """So many of its oldest blocks are not there any more."""
        self._trim(replica, max(0, len(self._blocks[replica]) - count))

    def found(self, hashes: Sequence[int], among: int) -> list[tuple[int, int]]:
        """How many of the first blocks are where: (blocks, bits of the replicas that have so many and no more), the
        most first. Each replica of the bits `among` is in one of them. Walks the blocks, not the replicas."""
        found: list[tuple[int, int]] = []
        holders, having, count = self._holders, among, 0
        for count, block in enumerate(hashes):
            here = having & holders.get(block, 0)
            if here != having:
                found.append((count, having ^ here))
                having = here
                if not here:
                    break
        if having:
            found.append((len(hashes), having))
        found.reverse()
        return found

    @property
    def _share(self) -> int:
        return self._most // len(self._blocks)

    def _trim(self, replica: int, most: int) -> None:
        blocks, holders, bit = self._blocks[replica], self._holders, 1 << replica
        while len(blocks) > most:
            block, _ = blocks.popitem(last=False)
            others = holders[block] ^ bit
            if others:
                holders[block] = others
            else:
                del holders[block]


def bits(mask: int) -> Iterator[int]:
    """The places of those that are set, the lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low

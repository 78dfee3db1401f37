"""Counter-based random numbers: the number at (seed, position) needs no history, so a resumed request draws the
same."""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox_uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform doubles in [0, 1), one per (seed, position), by Philox-4x32-10 (Salmon et al. 2011).

    The key is the seed, the counter the position (two words) and zeros; the first two words of the block make 53 bits.
    """
    key0, key1 = seeds & _LOW, seeds >> _SHIFT
    position = positions.astype(np.uint64)
    c0, c1 = position & _LOW, position >> _SHIFT
    c2 = c3 = np.zeros_like(c0)
    for _ in range(10):
        a, b = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> _SHIFT) ^ c1 ^ key0, b & _LOW, (a >> _SHIFT) ^ c3 ^ key1, a & _LOW
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    bits = ((c0 << _SHIFT) | c1) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53

"""From logits to tokens, V vocabulary, S rows, each row with its own parameters.

`penalize` and `add_bias` edit fp32 logits [S, V] in place, at listed tokens alone.

`mask_logits(logits, places, masks)` makes minus infinity, in place, of what grammars do not allow: logits [S, V] fp32,
places [M] int32 or int64 the rows that have a mask, none of them twice, masks [M, V / 32 rounded up] int32, whose bit i
of word j allows token 32 j + i. Nothing else is written: other rows may hold anything, and bits past V mean nothing.

`prepare(logits, rows)` finds what of each row may be drawn: by temperature the tokens within min-p, then top-k, then
top-p of what is left (tokens equal to the last one kept are kept too). It reads the logits once, and again only where
candidates stand; nothing is sorted. → `Prepared`.

`draw(logits, rows, prepared)` → tokens [S] int32: the most likely one where the temperature is 0, else by inversion of
the cumulative distribution in the order of token ids, at the number of the counter-based generator for (seed,
position); -1 where no token is possible, or a logit is not a number or plus infinity.

`token_logprobs(logits, tokens)` → log-probabilities [S] and ranks [S] (1: the most likely) of the raw logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

CHUNK = 4096  # tokens that one program looks at


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The parameters of S rows, on the device."""

    temperature: Tensor  # [S] fp32; 0: greedy
    top_k: Tensor  # [S] int32; 0: all
    top_p: Tensor  # [S] fp32; 1: all
    min_p: Tensor  # [S] fp32; 0: all
    seeds: Tensor  # [S] int64
    positions: Tensor  # [S] int64, of the token to be drawn

    def first(self, count: int) -> "Rows":
        """The parameters of the first rows."""
        return self._each(lambda tensor: tensor[:count])

    def cpu(self) -> "Rows":
        """The same on the host."""
        return self._each(Tensor.cpu)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        return Rows(**{name: change(getattr(self, name)) for name in Rows.__slots__})


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a row's draw needs. C chunks."""

    chunk_max: Tensor  # [S, C] fp32, of logits / temperature
    best: Tensor  # [S] int32, the most likely token; -1: none is possible
    threshold: Tensor  # [S] fp32: tokens below do not take part
    log_mass: Tensor  # [S] fp32, log of the sum of e^(logit / temperature) over those that do


@dataclass(frozen=True, kw_only=True, slots=True)
class Penalties:
    """Tokens that appeared, listed by row, and what each row makes of it. n listed tokens."""

    starts: Tensor  # [S + 1] int32: row s has the tokens starts[s] : starts[s + 1], none of them twice
    tokens: Tensor  # [n] int32
    counts: Tensor  # [n] int32, how often it was generated; 0: it stands in the prompt alone
    repetition: Tensor  # [S] fp32: logits of tokens seen are divided by it, or multiplied where negative; 1: none
    frequency: Tensor  # [S] fp32, times the count
    presence: Tensor  # [S] fp32, for what was generated at all


@dataclass(frozen=True, kw_only=True, slots=True)
class Biases:
    """Listed as in `Penalties`."""

    starts: Tensor  # [S + 1] int32
    tokens: Tensor  # [n] int32
    values: Tensor  # [n] fp32; minus infinity bans

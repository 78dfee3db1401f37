"""A step under way: launched, its result being copied to the host."""

import numpy as np
import torch
from torch import Tensor

from quire_engine.execution.images import Seen
from quire_engine.sampling.sampler import Drawn, TokenScores
from quire_engine.step import REJECTED, Failure, Places, StepResult, TokenLogprobs

_NO_LOGIT: Failure = ("no token has a finite logit: the parameters rule out all, or the model broke down", False)


class PendingStep:
    """What rank 0 has of a step before its result is read."""

    def __init__(
        self,
        places: Places,
        drawn: Drawn | None,
        prompt_scores: dict[int, tuple[list[TokenScores], int]],
        device: torch.device,
        vectors: Tensor | None = None,
        seen: Seen | None = None,
    ) -> None:
        """`prompt_scores`: row → its parts, and how many likeliest tokens were asked for. `seen`: of images."""
        self._seen = seen
        self._rows = places.rows
        self._tokens = drawn.tokens.to("cpu", non_blocking=True) if drawn is not None else None
        self._scores = drawn.scores.to_host() if drawn is not None and drawn.scores is not None else None
        self._scored = drawn.scored if drawn is not None else []
        self._failed = drawn.failed if drawn is not None else {}
        self._prompt = {row: ([part.to_host() for part in parts], n) for row, (parts, n) in prompt_scores.items()}
        self._vectors = vectors.to("cpu", non_blocking=True) if vectors is not None else None
        self._copied: torch.Event | None = None
        if device.type != "cpu":
            self._copied = torch.Event(device)
            self._copied.record()

    @property
    def ready(self) -> bool:
        """Whether `result` would not wait."""
        return self._copied is None or self._copied.query()

    def result(self) -> StepResult:
        """Waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._vectors is not None:
            return StepResult(np.zeros(len(self._rows), np.int32), vectors=self._vectors.numpy())
        tokens = np.zeros(0, np.int32) if self._tokens is None else self._tokens.numpy()
        failed = {int(self._rows[place]): _NO_LOGIT for place in np.flatnonzero(tokens == -1)} | self._failed
        if self._failed:
            tokens = np.where(np.isin(self._rows, list(self._failed)) & (tokens != REJECTED), -1, tokens)
        logprobs = {}
        if self._scores is not None:
            first = 0
            for row, width, places in self._scored:
                valid = np.count_nonzero(tokens[places.start : places.stop] != REJECTED)
                logprobs[row] = self._scores.read(slice(first, first + valid), width)
                first += len(places)
        prompt_logprobs = {row: _joined(*found) for row, found in self._prompt.items()}
        found = StepResult(tokens, logprobs, prompt_logprobs, failed)
        if self._seen is not None:
            found.encoder_seconds, found.unseen = self._seen.seconds(), self._seen.unseen
        return found


def _joined(parts: list[TokenScores], width: int) -> TokenLogprobs:
    read = [part.read(slice(None), width) for part in parts]
    if len(read) == 1:
        return read[0]
    return TokenLogprobs(*(np.concatenate([getattr(part, name) for part in read]) for name in TokenLogprobs.__slots__))

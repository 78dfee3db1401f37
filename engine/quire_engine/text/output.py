"""One choice's tokens becoming text: detokenized, cut at stop strings. Used by gateways and by offline batches."""

from collections.abc import Sequence

from quire_engine.text.params import SamplingParams
from quire_engine.text.stops import StopMatcher
from quire_engine.text.tokenizer import Tokenizer


class OutputText:
    """Push tokens, get the text that may be shown; `stopped_by` names the stop string that ended it.

    The text goes on where the prompt's ends: both together are the text of all the tokens. A stop string counts once
    it ends after `min_tokens` tokens, wherever it begins.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._detokenizer = tokenizer.stream(
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            after=prompt,
        )
        self._matcher = StopMatcher(params.stop_strings, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self.stopped_by: str | None = None

    @property
    def length(self) -> int:
        """Characters of all tokens so far, shown or held back."""
        return self._detokenizer.length

    def push(self, token_id: int, is_stop_token: bool = False) -> str:
        """The text that this token makes certain. A token that ended the output by itself adds no text."""
        self._num_tokens += 1
        if is_stop_token:
            return ""
        text = self._detokenizer.step(token_id)
        shown, self.stopped_by = self._matcher.push(text, ends=self._num_tokens > self._min_tokens)
        return shown

    def finish(self) -> str:
        """What was held back, when the output ends for another reason."""
        ends = self._num_tokens > self._min_tokens
        return self._matcher.push(self._detokenizer.flush(), ends=ends)[0] + self._matcher.flush()

"""One choice's tokens becoming text: detokenized, cut at stop strings. Used by gateways and by offline batches."""

from quire_engine.text.params import SamplingParams
from quire_engine.text.tokenizer import StopMatcher, Tokenizer


class OutputText:
    """Push tokens, get the text that may be shown; `stopped_by` names the stop string that ended it."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._detokenizer = tokenizer.stream(
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        self._matcher = StopMatcher(params.stop_strings, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self.stopped_by: str | None = None

    def push(self, token_id: int, is_stop_token: bool = False) -> str:
        """The text that this token makes certain. A token that ended the output by itself adds no text."""
        self._num_tokens += 1
        if is_stop_token:
            return ""
        text = self._detokenizer.step(token_id)
        if self._num_tokens <= self._min_tokens:
            return self._matcher.flush() + text
        shown, self.stopped_by = self._matcher.push(text)
        return shown

    def finish(self) -> str:
        """What was held back, when the output ends for another reason."""
        return self._matcher.push(self._detokenizer.flush())[0] + self._matcher.flush()

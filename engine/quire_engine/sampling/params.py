"""What a request asks of the sampler, in tokens. Texts (stop strings, words) are the gateway's and never come here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSampling:
    """Defaults as in the field. All bounds were checked where the request came in; see text/params.py."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # with the absolute position, the whole state of the random numbers
    stop_token_ids: tuple[int, ...] = ()  # the model's end tokens among them, unless they are ignored
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < 1e-5

    @property
    def penalized(self) -> bool:
        """Whether the tokens so far change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def edits_logits(self) -> bool:
        """Whether the logits of this request need anything before temperature."""
        return bool(
            self.penalized
            or self.logit_bias
            or self.allowed_token_ids
            or self.bad_words
            or (self.min_tokens and self.stop_token_ids)
        )

"""Models that guess what a model will draw: a smaller one of the same tokenizer, or a head on the model itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from quire_kernels.backends import AttentionBatch
from torch import Tensor

from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.layers.caches import LayerCache
from quire_engine.layers.linear import Builder
from quire_engine.models.decoder import Decoder, Model
from quire_engine.models.families import spec_of
from quire_engine.quantization.config import Quantization, quantization_of
from quire_engine.spec import DecoderSpec
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import ModelFiles, resolve


class Guesser(Protocol):
    """What a worker runs beside the model. It has pages of its own, under the numbers of the model's."""

    spec: DecoderSpec  # of its layers
    layers: Sequence[int]
    progress: Callable[[], None]  # called after each layer
    reads_states: bool  # at each place the model's hidden state and the token after it; else the token there alone
    taps: tuple[int, ...]  # layers of the model whose inputs are those states; none: what its head reads
    vocabulary: Tensor | None  # [its vocabulary] which token of the model each of its own is; None: the same

    def combined(self, states: Tensor) -> Tensor:
        """What the model gives [T, taps * hidden] → states [T, hidden] for the first guess."""

    def __call__(
        self, token_ids: Tensor, states: Tensor | None, batch: AttentionBatch, caches: list[LayerCache]
    ) -> Tensor:
        """[T] → states [T, hidden], which the next guess may start from."""

    def logits(self, states: Tensor) -> Tensor | None:
        """[S, hidden] → fp32 [S, its vocabulary] on the rank that draws."""


class DraftModel:
    """A model that goes by the tokens alone (Leviathan et al., arXiv 2211.17192)."""

    reads_states = False
    taps: tuple[int, ...] = ()
    vocabulary: Tensor | None = None

    def __init__(self, model: Model) -> None:
        self.spec, self.layers = model.spec, model.layers
        self._model = model

    @property
    def progress(self) -> Callable[[], None]:
        """Called after each layer."""
        return self._model.progress

    @progress.setter
    def progress(self, mark: Callable[[], None]) -> None:
        self._model.progress = mark

    def combined(self, states: Tensor) -> Tensor:
        raise AssertionError("it reads no states")

    def __call__(
        self, token_ids: Tensor, states: Tensor | None, batch: AttentionBatch, caches: list[LayerCache]
    ) -> Tensor:
        hidden = self._model(token_ids.clamp(max=self.spec.vocab_size - 1), batch, caches)
        assert hidden is not None, "the draft model is whole on its stage"
        return hidden

    def logits(self, states: Tensor) -> Tensor | None:
        return self._model.logits(states, None)


@dataclass(frozen=True)
class DraftSource:
    """Where a guesser comes from, and what it takes."""

    method: str  # draft_model, eagle, eagle3 or mtp
    files: ModelFiles
    spec: DecoderSpec
    quantization: Quantization

    @property
    def layers(self) -> Sequence[int]:
        """Those that have pages."""
        return range(self.spec.num_layers)

    def check_parallel(self, size: int, *, experts_apart: bool) -> None:
        """Raises InvalidParameter where so many ranks cannot share it."""
        try:
            self.spec.check_parallel(size, experts_apart=experts_apart)
        except ModelError as error:
            raise refused(f"{self.files.name}: {error}") from error

    def check_tokens(self, files: ModelFiles) -> None:
        """Raises InvalidParameter where its tokenizer is not that of the model, whose files these are."""
        one, other = (folder / "tokenizer.json" for folder in (files.folder, self.files.folder))
        if not (one.is_file() and other.is_file()) or one.read_bytes() == other.read_bytes():
            return
        known, own = (Tokenizer.load(each).vocabulary() for each in (files, self.files))
        differing = [token for token, number in own.items() if known.get(token) != number]
        if differing:
            raise refused(
                f"{self.files.name} has another tokenizer: {len(differing)} of its {len(own)} tokens are others, such "
                f"as {differing[0]!r:.40}; give a model of the same family"
            )

    def build(self, build: Builder, max_model_len: int, quantized_cache: bool) -> Guesser:
        """Reads the weights. `build`: of its own checkpoint and backend, and of one stage."""
        return DraftModel(Decoder(build, self.spec, max_model_len, quantized_cache=quantized_cache))


def draft_source(config: EngineConfig, spec: DecoderSpec) -> DraftSource | None:
    """The model that `--speculative-config` names, for a model of that `spec`; None: there is none. Raises
    InvalidParameter for one that cannot guess, and what `resolve` raises."""
    asked = config.speculation
    if asked is None or asked.model is None:
        return None
    files = resolve(asked.model, revision=asked.revision, download_dir=config.download_dir)
    found = spec_of(files.config)
    if found.pooling is not None or found.bidirectional:
        raise refused(f"{files.name} does not generate; give a model that does")
    if found.fallback is not None or found.recurrent_layers:
        raise refused(f"{files.name} keeps recurrent states, or is none that Quire's decoder knows; give another model")
    context = spec.served_context(config.max_model_len)
    if found.names.positions and found.max_position < context:
        raise refused(
            f"{files.name} has a context of {found.max_position} tokens; lower max_model_len ({context}) to it"
        )
    return DraftSource("draft_model", files, found, quantization_of(files.config, None))


def refused(why: str) -> InvalidParameter:
    """An error of `--speculative-config`."""
    return InvalidParameter(f"speculative_config: {why}", "speculative_config")

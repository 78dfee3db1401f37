"""Models that guess what a model will draw: a smaller one of the same tokenizer, or a head on the model itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from quire_kernels.backends import AttentionBatch
from torch import Tensor

from quire_engine.config import EngineConfig, SpeculativeConfig
from quire_engine.errors import ModelError
from quire_engine.layers.caches import LayerCache
from quire_engine.layers.linear import Builder
from quire_engine.models.decoder import Decoder, Model
from quire_engine.models.draft_heads import eagle_head, mtp_head, mtp_layer_spec
from quire_engine.models.eagle import eagle_spec, refused
from quire_engine.models.families import spec_of
from quire_engine.models.tied import as_stored
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


_FEW = 0.01  # of a vocabulary: what may be called otherwise in a tokenizer that is the same
Build = Callable[[Builder, Model, int, bool], Guesser]  # the model, its longest context, whether caches are quantized


@dataclass(frozen=True)
class DraftSource:
    """Where a guesser comes from, and what it takes."""

    method: str  # draft_model, eagle, eagle3 or mtp
    files: ModelFiles
    spec: DecoderSpec  # of its layers
    layers: Sequence[int]
    quantization: Quantization
    names: frozenset[str]  # of its own tensors, where they are known
    build: Build  # reads the weights. The builder is of those files, and of the rank's stage


def guesses_by(chosen: SpeculativeConfig | None, source: DraftSource | None) -> str:
    """What guesses, for people: a model, or a way to look into texts. Empty: nothing does."""
    if source is not None:
        return f"{source.files.name} ({source.method})"
    return chosen.method if chosen is not None else ""


def draft_source(
    config: EngineConfig, files: ModelFiles, spec: DecoderSpec, quantization: Quantization
) -> DraftSource | None:
    """What guesses beside a model by `--speculative-config`; None: no model does. Raises InvalidParameter for one that
    cannot."""
    asked = config.speculation
    if asked is None or asked.method in ("suffix", "ngram"):
        return None
    if asked.model is None:
        return _mtp(asked.method, files, spec, quantization)
    try:
        found = resolve(asked.model, revision=asked.revision, download_dir=config.download_dir)
        eagle = asked.method.startswith("eagle") or _is_eagle(found)
        source = _eagle(config, found, spec) if eagle else _draft_model(config, found, spec)
        source.spec.check_parallel(config.tensor_parallel_size, experts_apart=config.enable_expert_parallel)
    except ModelError as error:  # which would be taken for the model's own
        raise refused(f"of the model {asked.model!r:.80}: {error}") from error
    if asked.method not in ("auto", source.method):
        raise refused(f"method is {asked.method}, and {found.name} is for {source.method}; leave method out")
    _check_tokens(found, files)
    return source


def _check_tokens(draft: ModelFiles, files: ModelFiles) -> None:
    """Raises InvalidParameter where the tokenizer of a draft model, or a head, is not that of the model."""
    one, other = (folder / "tokenizer.json" for folder in (files.folder, draft.folder))
    if not (one.is_file() and other.is_file()) or one.read_bytes() == other.read_bytes():
        return
    try:
        own = Tokenizer.load(draft).vocabulary()
    except ModelError as error:
        raise refused(f"the tokenizer of {draft.name} cannot be read; give a model that has one") from error
    known = Tokenizer.load(files).vocabulary()
    differing = [token for token, number in own.items() if known.get(token) != number]
    if len(differing) > _FEW * len(own):  # families rename tokens that they had reserved
        raise refused(
            f"{draft.name} has another tokenizer: {len(differing)} of its {len(own)} tokens are others, such as "
            f"{differing[0]!r:.40}; give a model of the same family"
        )


def _is_eagle(files: ModelFiles) -> bool:
    """Not by the config alone: the first heads call themselves Llamas."""
    names = [str(name).lower() for name in files.config.get("architectures") or []]
    if any("eagle" in name for name in names) or "speculators_model_type" in files.config:
        return True
    return files.has_weights and "fc.weight" in files.checkpoint().names()


def _mtp(method: str, files: ModelFiles, spec: DecoderSpec, quantization: Quantization) -> DraftSource | None:
    if spec.mtp is None:
        if method == "mtp":
            raise refused(f"method is mtp, and {files.name} has no layer for it; leave method out")
        return None

    def build(builder: Builder, model: Model, max_model_len: int, quantized_cache: bool) -> Guesser:
        assert isinstance(model, Decoder)
        return mtp_head(builder, spec, model, max_model_len, quantized_cache)

    return DraftSource("mtp", files, mtp_layer_spec(spec), (spec.mtp.layer,), quantization, frozenset(), build)


def _eagle(config: EngineConfig, files: ModelFiles, spec: DecoderSpec) -> DraftSource:
    if spec.fallback is not None:
        raise refused(f"{files.name} is an EAGLE head, and transformers' code computes this model: leave it out")
    eagle = eagle_spec(files.config, spec)
    stages = config.pipeline_parallel_size
    if eagle.taps and stages > 1:
        raise refused(f"{files.name} reads layers of several stages; set pipeline_parallel_size 1")

    def build(builder: Builder, model: Model, max_model_len: int, quantized_cache: bool) -> Guesser:
        assert isinstance(model, Decoder)
        return eagle_head(builder, files.config, spec, model, max_model_len, quantized_cache)

    quantization = quantization_of(files.config, None)
    names = frozenset(files.checkpoint().names()) if files.has_weights else frozenset()
    method = "eagle3" if eagle.version == 3 else "eagle"
    return DraftSource(method, files, eagle.layer, (0,), quantization, names, build)


def _draft_model(config: EngineConfig, files: ModelFiles, spec: DecoderSpec) -> DraftSource:
    found = spec_of(files.config, images=False)
    if found.fallback is None and files.has_weights:
        found = as_stored(found, files.checkpoint())
    if found.pooling is not None or found.bidirectional:
        raise refused(f"{files.name} does not generate; give a model that does")
    if found.fallback is not None or found.recurrent_layers:
        raise refused(f"{files.name} keeps recurrent states, or is none that Quire's decoder knows; give another model")
    context, own = spec.served_context(config.max_model_len), found.max_position
    if found.names.positions and own < context:
        raise refused(f"{files.name} has a context of {own} tokens; lower max_model_len ({context}) to it")

    def build(builder: Builder, model: Model, max_model_len: int, quantized_cache: bool) -> Guesser:
        alone = replace(builder, group=builder.group.of_stage())
        return DraftModel(Decoder(alone, found, max_model_len, quantized_cache=quantized_cache))

    quantization = quantization_of(files.config, None)
    return DraftSource("draft_model", files, found, range(found.num_layers), quantization, frozenset(), build)

"""Which drafter an engine has."""

from dataclasses import replace

from quire_engine.config import EngineConfig, SchedulerLimits, SpeculativeConfig
from quire_engine.errors import InvalidParameter
from quire_engine.spec import DecoderSpec
from quire_engine.speculation.draft import Drafter
from quire_engine.speculation.ngram import NgramDrafter
from quire_engine.speculation.speculation import Speculation
from quire_engine.speculation.suffix import SuffixDrafter
from quire_engine.speculation.value import Value
from quire_engine.speculation.workers import WorkersDrafter


def choose(config: EngineConfig, spec: DecoderSpec, method: str | None = None) -> SpeculativeConfig | None:
    """What `--speculative-config` comes to for this model, where `method` is what its draft model is; None: nothing is
    guessed. Raises InvalidParameter for what the model cannot do."""
    asked = config.speculation
    if asked is not None and spec.pooling is not None:
        raise InvalidParameter(
            "speculative_config is for models that generate; this one gives vectors or scores: leave it out",
            "speculative_config",
        )
    if asked is None:
        return None
    if method is None and asked.method == "auto" and asked.model is None:
        method = "suffix"
    return replace(asked, method=method or asked.method)


def speculation_of(limits: SchedulerLimits) -> Speculation | None:
    """As an engine with these limits has it."""
    chosen = limits.speculation
    if chosen is None:
        return None
    drafter: Drafter = WorkersDrafter()
    if chosen.method == "suffix":
        drafter = SuffixDrafter()
    elif chosen.method == "ngram":
        drafter = NgramDrafter(chosen.prompt_lookup_min, chosen.prompt_lookup_max)
    most = chosen.num_speculative_tokens
    return Speculation(drafter, Value(most), most)

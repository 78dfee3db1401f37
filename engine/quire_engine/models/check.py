"""What can be known of a model before anything is started for it."""

from dataclasses import dataclass

from quire_engine.config import EngineConfig
from quire_engine.models.families import spec_of
from quire_engine.pooling import pooling_of
from quire_engine.quantization.config import quantization_of
from quire_engine.weights.resolve import ModelFiles, find_model


@dataclass(frozen=True)
class CheckedModel:
    """`max_model_len`: the context of an engine that has memory for it."""

    files: ModelFiles
    max_model_len: int


def check_model(config: EngineConfig) -> CheckedModel:
    """The files are there, whole, and of a family that is served and can be split as wanted. Raises QuireError."""
    files = find_model(config)
    spec = spec_of(files.config, pooling_of(files, config.task), images=config.images_per_prompt > 0)
    max_model_len = spec.served_context(config.max_model_len) + (spec.pooling is not None)  # one place that stays empty
    spec.check_parallel(
        config.tensor_parallel_size, config.pipeline_parallel_size, experts_apart=config.enable_expert_parallel
    )
    quantization_of(files.config, config.quantization)
    if config.load_format != "dummy":
        files.checkpoint()
    return CheckedModel(files, max_model_len)

"""What can be known of a model before anything is started for it."""

from quire_engine.config import EngineConfig
from quire_engine.models.families import spec_of
from quire_engine.quantization.config import quantization_of
from quire_engine.weights.resolve import ModelFiles, find_model


def check_model(config: EngineConfig) -> ModelFiles:
    """The files are there, whole, and of a family that is served and can be split as wanted. Raises QuireError."""
    files = find_model(config)
    spec_of(files.config).check_parallel(
        config.tensor_parallel_size, config.pipeline_parallel_size, experts_apart=config.enable_expert_parallel
    )
    quantization_of(files.config, config.quantization)
    if config.load_format != "dummy":
        files.checkpoint()
    return files

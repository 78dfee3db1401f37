"""Which kernels a worker calls, and whether its steps are captured."""

import pytest
import torch
from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter
from quire_engine.execution.checks import check_served
from quire_engine.memory.plan import Target, captures_steps, gpu_target
from quire_engine.models.families import spec_of
from quire_engine.quantization.config import Quantization
from quire_engine.spec import DecoderSpec
from quire_engine.weights.hf_config import completed


def config_of(**options: object) -> EngineConfig:
    return EngineConfig(model="-", **options)


@pytest.fixture
def spec() -> DecoderSpec:
    return spec_of(completed({"architectures": ["LlamaForCausalLM"]}))


def test_flash_is_refused_where_it_cannot_be(spec: DecoderSpec) -> None:
    for options, dtype, why in (
        ({}, torch.bfloat16, "it runs on sm_90"),
        ({}, torch.float32, "not with torch.float32"),
        ({"kv_cache_dtype": "fp8"}, torch.bfloat16, "a cache in fp8"),
        ({"deterministic": True, "device": "cpu"}, torch.float32, "deterministic is asked for"),
    ):
        with pytest.raises(InvalidParameter, match=f"{why}.*leave it out"):
            config = config_of(attention_backend="flash", **options)
            check_served(config, spec, Target("cpu", "cpu"), dtype, Quantization())


def test_kernels_are_refused_on_devices_they_are_not_for(spec: DecoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU that is not here as well."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    h100, a100 = gpu_target("H100")[0], gpu_target("A100-80GB")[0]
    check_served(config_of(attention_backend="flash"), spec, h100, torch.bfloat16, Quantization())
    for backend, target in (("native", h100), ("flash", a100), ("triton", Target("cpu", "cpu"))):
        with pytest.raises(InvalidParameter) as refused:
            check_served(config_of(attention_backend=backend), spec, target, torch.bfloat16, Quantization())
        assert refused.value.parameter == "attention_backend"


def test_what_is_captured(spec: DecoderSpec) -> None:
    """Not on CPUs, nor where the host has its hands in a step: torch's references read values, stages send."""
    assert captures_steps(config_of(), spec, cpu=False)
    assert captures_steps(config_of(attention_backend="triton", tensor_parallel_size=2), spec, cpu=False)
    assert not captures_steps(config_of(), spec, cpu=True)
    for options in ({"enforce_eager": True}, {"attention_backend": "torch"}, {"pipeline_parallel_size": 2}):
        assert not captures_steps(config_of(**options), spec, cpu=False)

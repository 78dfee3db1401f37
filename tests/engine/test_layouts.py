"""How checkpoints lay out their weights, where transformers has no class that writes them so; and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LONGROPE
from greedy import engine_for, prompts, run, truth
from layouts import MXFP4_CONFIG, as_internlm2, from_mxfp4, in_mxfp4, rewritten
from quire_engine.config import EngineConfig
from quire_engine.errors import ModelError
from quire_engine.layers.linear import Builder
from quire_engine.memory.dry_run import DryGroup
from quire_engine.models.decoder import Decoder
from quire_engine.models.families import FAMILIES, spec_of
from quire_engine.quantization.config import quantization_of
from quire_engine.weights.resolve import find_model
from quire_engine.weights.tensors import TensorReader
from quire_kernels.moe import Experts
from quire_kernels.torch_backend import TorchBackend
from transformers import AutoModelForCausalLM

Make = Callable[[str], Path]


def test_internlm2(checkpoint: Make, tmp_path: Path) -> None:
    """Llama's weights under InternLM2's names, queries, keys and values of each group one after another."""
    plain = rewritten(
        checkpoint("llama"),
        tmp_path / "plain",
        lambda tensors: {name: t for name, t in tensors.items() if ".mlp." not in name or not name.endswith("bias")},
        mlp_bias=False,
    )
    named = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    folder = rewritten(plain, tmp_path / "internlm2", as_internlm2, bias=True, **named)
    assert run(engine_for(folder), prompts()) == truth(plain, prompts())


@pytest.mark.parametrize(("family", "kind"), [("falcon_7b", "RefinedWebModel"), ("falcon_40b", "RefinedWeb")])
def test_the_first_falcon_configs(checkpoint: Make, tmp_path: Path, family: str, kind: str) -> None:
    """Before transformers had the family."""
    folder = rewritten(checkpoint(family), tmp_path / "first", dict.copy)
    config = json.loads((folder / "config.json").read_text())
    first = {"architectures": ["RWForCausalLM"], "model_type": kind}
    for name in ("alibi", "bias", "hidden_size", "layer_norm_epsilon", "multi_query", "parallel_attn", "vocab_size"):
        first[name] = config[name]
    first |= {"n_layer": config["num_hidden_layers"], "n_head": config["num_attention_heads"]}
    if kind == "RefinedWeb":
        first["n_head_kv"] = config["num_kv_heads"]
    (folder / "config.json").write_text(json.dumps(first))
    assert run(engine_for(folder), prompts()) == truth(checkpoint(family), prompts())


def test_mxfp4(checkpoint: Make, tmp_path: Path) -> None:
    """gpt-oss' experts in 4-bit floats give what their values mean, by transformers' own decoding."""
    original = checkpoint("gpt_oss")
    folder = rewritten(original, tmp_path / "mxfp4", in_mxfp4, **MXFP4_CONFIG)
    plain = rewritten(folder, tmp_path / "plain", from_mxfp4, quantization_config=None)
    assert run(engine_for(folder), prompts()) == truth(plain, prompts())
    few = prompts()[1:3]
    engine = engine_for(folder, attention_backend="triton")  # which multiplies with them as they are
    layer: Any = engine._executor._model._layers[0]
    assert layer._mlp._experts.down.dtype == torch.uint8
    assert run(engine, few, max_tokens=4) == [tokens[:4] for tokens in truth(plain, few)]


@pytest.mark.parametrize("family", ["mxfp4", "gpt_oss", "granite_moe"])
def test_stacked_experts_are_cut(checkpoint: Make, tmp_path: Path, family: str) -> None:
    """Two ranks' parts are the halves of what one holds, though a half of 48 inputs cuts a block of MXFP4 in two."""
    folder = checkpoint("gpt_oss" if family == "mxfp4" else family)
    if family == "mxfp4":
        folder = rewritten(folder, tmp_path / "mxfp4", in_mxfp4, **MXFP4_CONFIG)
    files = find_model(EngineConfig(model=str(folder)))
    spec, quantization = spec_of(files.config), quantization_of(files.config, None)

    def experts(rank: int, size: int) -> Experts:
        reader = TensorReader(files.checkpoint(), torch.float32, torch.device("cpu"))
        build = Builder(reader, DryGroup(rank, size), TorchBackend(), quantization)
        layer: Any = Decoder(build, spec, spec.max_position)._layers[1]
        return layer._mlp._experts

    whole, halves = experts(0, 1), [experts(rank, 2) for rank in range(2)]
    gates, ups = whole.gate_up.chunk(2, 1)
    for number, half in enumerate(halves):
        expected = torch.cat((gates.chunk(2, 1)[number], ups.chunk(2, 1)[number]), 1)
        assert torch.equal(half.gate_up, expected)
        assert torch.equal(half.down, whole.down.chunk(2, 2)[number])


@pytest.mark.parametrize("family", ["phi3", "phimoe", "apertus"])
def test_longrope_beyond_the_original_context(checkpoint: Make, tmp_path: Path, family: str) -> None:
    """Served with a longer context than the original one, the factors for long contexts hold from the first token on,
    as in transformers for a prompt of such a length."""
    rope = LONGROPE | ({"short_mscale": 1.1, "long_mscale": 1.9} if family == "phimoe" else {})
    folder = rewritten(
        checkpoint(family), tmp_path / family, dict.copy, rope_parameters=rope, original_max_position_embeddings=64
    )
    long = [prompt for prompt in prompts() if len(prompt) > 64]
    assert run(engine_for(folder), long) == truth(folder, long)
    short = [prompt for prompt in prompts() if len(prompt) < 30]
    assert run(engine_for(folder, max_model_len=64), short) == truth(folder, short)
    assert run(engine_for(folder), short) != truth(folder, short)


@pytest.mark.parametrize(
    ("family", "facts", "named"),
    [
        ("llama", {"hidden_act": "mish"}, "hidden_act is 'mish'; served are silu"),
        ("apertus", {"hidden_act": "mish9"}, "config.json asks for 'mish9', which"),
        ("llama", {"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, "rope_type 'ntk'; known are default"),
        ("llama", {"quantization_config": {"quant_method": "bitnet"}}, "asks for 'bitnet'; served are fp8"),
        (
            "llama",
            {"architectures": ["UnheardOfForCausalLM"], "model_type": "unheard_of"},
            "UnheardOfForCausalLM.*served are Arcee",
        ),
        (
            "gemma3",
            {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "layer_types has linear_attention",
        ),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0; served is 7.0"),
        ("deepseek_v2", {"topk_method": "noaux"}, "topk_method is 'noaux'; served are greedy"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is false"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm is true"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config lacks alibi"),
        ("qwen3_5", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; models with recurrent layers are served with silu"),
        ("bamba", {"hidden_act": "relu"}, "hidden_act is 'relu'; models with recurrent layers"),
        ("mamba2", {"hidden_act": "relu"}, "hidden_act is 'relu'; models with recurrent layers"),
        ("nemotron_h", {"mamba_hidden_act": "relu"}, "mamba_hidden_act is 'relu'; models with recurrent layers"),
        ("qwen3_moe", {"num_experts": 0, "num_local_experts": 0}, "3 experts a token and 0 to choose them from"),
        ("deepseek_v2", {"n_group": 8}, "3 experts a token and 2 to choose them from"),
        ("llama", {"num_hidden_layers": None}, "is not one of llama in transformers.*num_hidden_layers"),
        ("lfm2_moe", {"layer_types": None}, "config.json lacks layer_types"),
    ],
)
def test_what_a_family_is_not_served_with_is_named(
    checkpoint: Make, tmp_path: Path, family: str, facts: dict[str, Any], named: str
) -> None:
    folder = rewritten(checkpoint(family), tmp_path / family, dict.copy, **facts)
    with pytest.raises(ModelError, match=named):
        engine_for(folder)


def test_hunyuan_raises_the_base(checkpoint: Make, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "alpha": 1000.0, "rope_theta": 10000.0, "factor": 1.0}
    folder = rewritten(checkpoint("hunyuan"), tmp_path / "hunyuan", dict.copy, rope_parameters=rope)
    assert run(engine_for(folder), prompts()) == truth(folder, prompts())


def test_layers_that_predict_further_tokens_are_left_out(checkpoint: Make, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"model.layers.3.eh_proj.weight": torch.zeros(64, 128)}

    folder = rewritten(checkpoint("deepseek_v3"), tmp_path / "mtp", change, num_nextn_predict_layers=1)
    assert run(engine_for(folder), prompts()[:1]) == truth(checkpoint("deepseek_v3"), prompts()[:1])
    with pytest.raises(ModelError, match="does not use"):
        engine_for(rewritten(checkpoint("deepseek_v3"), tmp_path / "no-mtp", change, num_nextn_predict_layers=0))


def test_a_median_family_is_a_page() -> None:
    """Of the files with families' facts; and nothing outside them asks which family it is."""
    root = Path(spec_of.__code__.co_filename).parents[1]
    files = sorted({Path(spec.__code__.co_filename) for spec in FAMILIES.values()})
    lengths = sorted(len(file.read_text().splitlines()) for file in files)
    assert lengths[len(lengths) // 2] < 60
    for file in root.rglob("*.py"):
        if file.parent.name not in ("models", "gguf") and file.name != "text_parts.py":  # which translate names
            text = file.read_text()
            assert not [name for name in FAMILIES if name in text], file


def test_transformers_loads_what_these_tests_write(checkpoint: Make, tmp_path: Path) -> None:
    """The copies are whole checkpoints."""
    folder = rewritten(checkpoint("llama"), tmp_path / "copy", dict.copy)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 3

"""Quantized checkpoints, written here format by format, against transformers with the weights they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.execution.runner import ModelRunner
from quire_engine.quantization.config import quantization_of
from quire_engine.request import EngineSampling, Request
from quire_engine.weights.resolve import find_model
from quire_kernels.quantized_matmul import Int4Weight
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
PROMPT = [5, 77, 130, 9, 250, 31, 8, 8, 199, 64, 3, 17, 280, 45, 6, 91, 120, 33]
Tensors = dict[str, Tensor]
Writer = Callable[[Tensor], tuple[Tensors, Tensor]]  # a weight → what is stored for it, and what that stands for
Rounding = Callable[[Tensor], Tensor]  # an input → what the product sees of it


# ---- weights ------------------------------------------------------------


def fp8_tensor(w: Tensor) -> tuple[Tensors, Tensor]:
    scale = w.abs().max() / LARGEST
    values = (w / scale).to(E4M3)
    return {"weight": values, "weight_scale": scale.reshape(1)}, values.float() * scale


def fp8_static(w: Tensor) -> tuple[Tensors, Tensor]:
    stored, meaning = fp8_tensor(w)
    return stored | {"input_scale": torch.tensor(STATIC)}, meaning


def fp8_channel(w: Tensor) -> tuple[Tensors, Tensor]:
    scale = w.abs().amax(1, keepdim=True) / LARGEST
    values = (w / scale).to(E4M3)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def fp8_blocks(w: Tensor) -> tuple[Tensors, Tensor]:
    rows, columns = -(-w.shape[0] // 128), -(-w.shape[1] // 128)
    padded = torch.zeros(rows * 128, columns * 128)
    padded[: w.shape[0], : w.shape[1]] = w
    blocks = padded.view(rows, 128, columns, 128)
    scale = (blocks.abs().amax((1, 3)) / LARGEST).bfloat16()  # as published checkpoints store it
    wide = scale.float()[:, None, :, None]
    values = (blocks / wide).clamp(-LARGEST, LARGEST).to(E4M3)
    meaning = (values.float() * wide).view(padded.shape)[: w.shape[0], : w.shape[1]].contiguous()
    stored = values.view(padded.shape)[: w.shape[0], : w.shape[1]].contiguous()
    return {"weight": stored, "weight_scale_inv": scale}, meaning


def int8_channel(w: Tensor) -> tuple[Tensors, Tensor]:
    scale = w.abs().amax(1, keepdim=True) / 127
    values = (w / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def groups_of(w: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """values [N, K] in 0..15, scales and zeros [N, K / group]."""
    grouped = w.view(w.shape[0], -1, group)
    if symmetric:
        scales = (grouped.abs().amax(-1) / 7).half().float()
        zeros = torch.full_like(scales, 8)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round().clamp(0, 15)
    values = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return values.view(w.shape).int(), scales, zeros.int()


def meaning_of(values: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    wide = (t.repeat_interleave(group, 1) for t in (scales, zeros))
    scale, zero = wide
    return (values - zero).float() * scale


def words(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[rows, N] below 16 → [rows, N / 8] int32, column i of eight in nibble order[i]."""
    out = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for i, nibble in enumerate(order):
        out |= values[:, i::8].long() << (4 * nibble)
    return torch.where(out >= 1 << 31, out - (1 << 32), out).int()


def awq(w: Tensor) -> tuple[Tensors, Tensor]:
    values, scales, zeros = groups_of(w, 32, symmetric=False)
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    stored = {
        "qweight": words(values.T, order),
        "qzeros": words(zeros.T, order),
        "scales": scales.T.contiguous().half(),
    }
    return stored, meaning_of(values, scales, zeros, 32)


def gptq(w: Tensor) -> tuple[Tensors, Tensor]:
    values, scales, zeros = groups_of(w, 32, symmetric=False)
    zeros = zeros.clamp(min=1)
    stored = {
        "qweight": words(values).T.contiguous(),
        "qzeros": words((zeros - 1).T),
        "scales": scales.T.contiguous().half(),
        "g_idx": (torch.arange(w.shape[1]) // 32).int(),
    }
    return stored, meaning_of(values, scales, zeros, 32)


def packed(w: Tensor) -> tuple[Tensors, Tensor]:
    values, scales, zeros = groups_of(w, 32, symmetric=True)
    stored = {"weight_packed": words(values), "weight_scale": scales, "weight_shape": torch.tensor(w.shape)}
    return stored, meaning_of(values, scales, zeros, 32)


def packed_asymmetric(w: Tensor) -> tuple[Tensors, Tensor]:
    values, scales, zeros = groups_of(w, 32, symmetric=False)
    stored = {
        "weight_packed": words(values),
        "weight_scale": scales,
        "weight_zero_point": words(zeros.T).T.contiguous(),
        "weight_shape": torch.tensor(w.shape),
    }
    return stored, meaning_of(values, scales, zeros, 32)


# ---- inputs ------------------------------------------------------------

STATIC = 0.02


def as_is(x: Tensor) -> Tensor:
    return x


def per_token(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(E4M3).float() * scale


def per_block(x: Tensor) -> Tensor:
    return per_token(x.unflatten(-1, (-1, 128))).flatten(-2)


def statically(x: Tensor) -> Tensor:
    return (x / STATIC).clamp(-LARGEST, LARGEST).to(E4M3).float() * STATIC


def int8_per_token(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale + 0.5).floor() * scale


# ---- formats ------------------------------------------------------------


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*layers\\.1\\.mlp.*"],
    }


_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
FORMATS: dict[str, tuple[dict[str, Any], Writer, Rounding]] = {
    "fp8 per tensor": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, fp8_tensor, per_token),
    "fp8 static": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_static, statically),
    "fp8 in blocks": (
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp"],
        },
        fp8_blocks,
        per_block,
    ),
    "compressed fp8 per channel": (
        compressed({"num_bits": 8, "type": "float", "strategy": "channel"}, _TOKEN, "float-quantized"),
        fp8_channel,
        per_token,
    ),
    "compressed int8": (
        compressed(
            {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            _TOKEN | {"type": "int"},
            "int-quantized",
        ),
        int8_channel,
        int8_per_token,
    ),
    "compressed int4": (
        compressed(
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
            None,
            "pack-quantized",
        ),
        packed,
        as_is,
    ),
    "compressed int4 with zeros": (
        compressed(
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
            None,
            "pack-quantized",
        ),
        packed_asymmetric,
        as_is,
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq, as_is),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, gptq, as_is),
}
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}


def is_quantized(name: str, settings: dict[str, Any]) -> bool:
    if not name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
        return False
    left = [*settings.get("ignore", []), *settings.get("modules_to_not_convert", [])]
    return not (len(left) > 1 and ".layers.1.mlp." in name)


def quantized_checkpoint(source: Path, folder: Path, kind: str) -> Callable[[], Any]:
    """Writes the checkpoint into `folder`; gives transformers' model with what its weights and inputs stand for."""
    settings, write, rounding = FORMATS[kind]
    tensors: Tensors = {}
    meant: Tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        meant[name] = weight
        if is_quantized(name, settings):
            stored, meant[name] = write(weight)
            tensors |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in stored.items()}
        else:
            tensors[name] = weight
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")

    def truth() -> Any:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        missing = model.load_state_dict(meant, strict=False)
        assert not missing.unexpected_keys
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and is_quantized(f"{name}.weight", settings):
                module.register_forward_pre_hook(lambda _, args: (rounding(args[0]), *args[1:]))
        return model

    return truth


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain"), "qwen3", **SIZES)


def runner_for(folder: Path, **options: Any) -> ModelRunner:
    config = EngineConfig(model=str(folder), device="cpu", kv_cache_memory_bytes=8 << 20, **options)
    return ModelRunner(config, find_model(config))


def logits_of(runner: ModelRunner, prompt: list[int]) -> Tensor:
    seen: list[Tensor] = []
    whole = runner._model.logits
    runner._model.logits = lambda hidden, out: seen.append(whole(hidden, out).clone()) or seen[-1].clone()
    engine = Engine(runner)
    engine.add(Request(1, list(prompt), len(prompt), EngineSampling(temperature=0.0, max_tokens=1, prompt_logprobs=0)))
    while engine.has_work:
        engine.step()
    runner._model.logits = whole
    return torch.cat(seen)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_formats(source: Path, tmp_path: Path, kind: str) -> None:
    """4-bit weights exactly; 8-bit inputs are rounded alike but where a value lies between two numbers."""
    truth = quantized_checkpoint(source, tmp_path / "quantized", kind)()
    ours = logits_of(runner_for(tmp_path / "quantized"), PROMPT)
    with torch.no_grad():
        theirs = truth(torch.tensor([PROMPT])).logits[0]
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(torch.tensor([PROMPT])).logits[0]
    error = (ours - theirs).abs()
    if FORMATS[kind][2] is as_is:
        assert error.max() < 1e-4
        return
    cost = (theirs - plain).abs().mean()
    assert error.mean() < 0.15 * cost, "closer to the quantized model than that is to the plain one"


@pytest.mark.parametrize("kind", [kind for kind, (_, _, rounding) in FORMATS.items() if rounding is as_is])
def test_experts_in_int4(tmp_path: Path, kind: str) -> None:
    """Exactly, on a CPU as what they mean, and by the Triton kernel as they are."""
    sizes = SIZES | {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": []}
    source = make_checkpoint(tmp_path / "plain", "qwen3_moe", **sizes)
    quantized_checkpoint(source, tmp_path / "quantized", kind)
    settings, write, _ = FORMATS[kind]
    meant = {
        name: write(weight)[1] if is_quantized(name, settings) else weight
        for name, weight in load_file(source / "model.safetensors").items()
    }
    save_file(meant, source / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        theirs = model(torch.tensor([PROMPT])).logits[0]
    assert (logits_of(runner_for(tmp_path / "quantized"), PROMPT) - theirs).abs().max() < 1e-4
    runner = runner_for(tmp_path / "quantized", attention_backend="triton")
    layer: Any = runner._model._layers[0]
    assert isinstance(layer._mlp._experts.down, Int4Weight)
    assert (logits_of(runner, PROMPT[:6]) - theirs[:6]).abs().max() < 1e-4


def test_latent_attention_in_fp8_blocks(tmp_path: Path) -> None:
    """As in DeepSeek-V3. The projection up from the latent is absorbed, so its inputs are not rounded."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "initializer_range": 0.1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "first_k_dense_replace": 3,
    }
    source = make_checkpoint(tmp_path / "plain", "deepseek_v3", **sizes)
    truth = quantized_checkpoint(source, tmp_path / "quantized", "fp8 in blocks")()
    for name, module in truth.named_modules():
        if name.endswith("kv_b_proj"):
            module._forward_pre_hooks.clear()
    ours = logits_of(runner_for(tmp_path / "quantized"), PROMPT)
    with torch.no_grad():
        theirs = truth(torch.tensor([PROMPT])).logits[0]
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(torch.tensor([PROMPT])).logits[0]
    assert (ours - theirs).abs().mean() < 0.15 * (theirs - plain).abs().mean()


@pytest.mark.parametrize(("option", "kind"), [("fp8", "compressed fp8 per channel"), ("int8", "compressed int8")])
def test_quantized_at_load(source: Path, tmp_path: Path, option: str, kind: str) -> None:
    """As a checkpoint that holds every layer's weights quantized per output."""
    settings, write, rounding = FORMATS[kind]
    FORMATS["all"] = ({key: value for key, value in settings.items() if key != "ignore"}, write, rounding)
    quantized_checkpoint(source, tmp_path / "quantized", "all")
    del FORMATS["all"]
    online = logits_of(runner_for(source, quantization=option), PROMPT)
    stored = logits_of(runner_for(tmp_path / "quantized"), PROMPT)
    torch.testing.assert_close(online, stored, atol=5e-3 if option == "int8" else 1e-4, rtol=0)


def test_fp8_cache(source: Path, tmp_path: Path) -> None:
    """As transformers with keys and values rounded to e4m3 before attention; calibrated scales are taken."""
    from transformers.models.qwen3 import modeling_qwen3

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    attend = modeling_qwen3.eager_attention_forward
    folder = tmp_path / "scaled"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor([0.11])
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([0.07])
    save_file(tensors, folder / "model.safetensors")
    for where, k_scale, v_scale in ((source, 1.0, 1.0), (folder, 0.11, 0.07)):

        def rounded(
            module: Any,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *rest: Any,
            by: tuple[float, float] = (k_scale, v_scale),
            **kw: Any,
        ) -> Any:
            k, v = ((x / s).clamp(-LARGEST, LARGEST).to(E4M3).float() * s for x, s in zip((k, v), by, strict=True))
            return attend(module, q, k, v, *rest, **kw)

        modeling_qwen3.eager_attention_forward = rounded
        try:
            with torch.no_grad():
                theirs = model(torch.tensor([PROMPT])).logits[0]
        finally:
            modeling_qwen3.eager_attention_forward = attend
        ours = logits_of(runner_for(where, kv_cache_dtype="fp8"), PROMPT)
        with torch.no_grad():
            cost = (model(torch.tensor([PROMPT])).logits[0] - theirs).abs().mean()
        assert cost > 1e-3, "rounding made no difference"
        assert (ours - theirs).abs().mean() < 0.1 * cost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            r"weight_block_size \[64, 64\]; served is",
        ),
        ({"quant_method": "awq", "bits": 8}, "bits 8; served is 4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "group_size 16; served is 32, 64, 128"),
        ({"quant_method": "bitsandbytes"}, "served are fp8, compressed-tensors"),
        (compressed({"num_bits": 2, "type": "int", "strategy": "group"}, None, "pack-quantized"), "2 bits"),
        (
            compressed(
                {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "actorder": "group"}, None, ""
            ),
            "actorder",
        ),
    ],
)
def test_what_is_not_served_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        quantization_of({"quantization_config": change}, None)


def test_a_quantized_checkpoint_is_not_quantized_again() -> None:
    with pytest.raises(InvalidParameter, match="already"):
        quantization_of({"quantization_config": FORMATS["awq"][0]}, "fp8")


@pytest.mark.parametrize("kind", ["compressed fp8 per channel", "fp8 in blocks", "compressed int8", "compressed int4"])
def test_formats_through_triton(source: Path, tmp_path: Path, kind: str) -> None:
    """The same logits as by torch's operators, with an fp8 cache besides."""
    quantized_checkpoint(source, tmp_path / "quantized", kind)
    ours, theirs = (
        logits_of(runner_for(tmp_path / "quantized", attention_backend=backend, kv_cache_dtype="fp8"), PROMPT[:6])
        for backend in ("triton", "torch")
    )
    plain = logits_of(runner_for(source), PROMPT[:6])
    cost = (theirs - plain).abs().mean()
    assert (ours - theirs).abs().mean() < 0.15 * cost

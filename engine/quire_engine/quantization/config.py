"""From `quantization_config` (or `--quantization`) to the scheme of each linear layer."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from quire_kernels.quantize import BLOCK_COLUMNS
from quire_kernels.quantized_matmul import GROUPS

from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.quantization.schemes import MXFP4, Int4, Plain, Scaled, Scheme

_PLAIN = Plain()
SERVED = "fp8, compressed-tensors (fp8, int8 and packed int4), awq and gptq in 4 bits, mxfp4 experts"


@dataclass(frozen=True, slots=True)
class Quantization:
    """One scheme for all linear layers but those that are left as they are. The head and routers never are in it."""

    name: str = "none"
    scheme: Scheme = _PLAIN
    left: tuple[str, ...] = ()  # modules, or parts of their names; "re:" begins a regular expression

    @property
    def in_4_bits(self) -> bool:
        """Whether experts may be in 4 bits."""
        return isinstance(self.scheme, Int4 | MXFP4)

    def scheme_of(self, module: str) -> Scheme:
        """module: as in the checkpoint, without ".weight"."""
        return _PLAIN if any(_names(pattern, module) for pattern in self.left) else self.scheme


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.startswith(f"{pattern}.") or f".{pattern}." in f".{module}."


def quantization_of(config: dict[str, Any], wanted: str | None) -> Quantization:
    """Raises ModelError for a scheme that is not served, InvalidParameter where `--quantization` is another one."""
    stored = config.get("quantization_config") or config.get("compression_config")
    if not stored:
        if wanted is None:
            return Quantization()
        kind = torch.int8 if wanted == "int8" else torch.float8_e4m3fn
        return Quantization(f"{wanted}, quantized at load", Scaled(kind, online=True))
    method = str(stored.get("quant_method", "compressed-tensors" if "config_groups" in stored else "an unnamed scheme"))
    readers = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq, "mxfp4": _mxfp4}
    if method not in readers:
        raise ModelError(f"quantization_config asks for {method!r}; served are {SERVED}")
    found = readers[method](stored)
    if wanted is not None and not found.name.startswith(wanted):
        raise InvalidParameter(
            f"quantization is {wanted!r}, but the checkpoint is quantized already ({found.name}); leave it out",
            "quantization",
        )
    return found


def _refuse(field: str, value: object, accepted: str) -> ModelError:
    return ModelError(f"quantization_config has {field} {value!r}; served is {accepted}")


def _group_size(stored: dict[str, Any]) -> int:
    """Raises ModelError where it is missing, or of a size that the kernels do not have."""
    size = stored.get("group_size")
    if size not in GROUPS:
        raise _refuse("group_size", size, ", ".join(map(str, GROUPS)))
    return int(size)


def _left(stored: dict[str, Any], key: str) -> tuple[str, ...]:
    return tuple(stored.get(key) or ())


def _fp8(stored: dict[str, Any]) -> Quantization:
    """Hugging Face's: per tensor, or in blocks as DeepSeek-V3's."""
    left = _left(stored, "modules_to_not_convert")
    static = stored.get("activation_scheme", "dynamic") == "static"
    blocks = stored.get("weight_block_size")
    if blocks is None:
        return Quantization("fp8", Scaled(torch.float8_e4m3fn, static_inputs=static), left)
    if list(blocks) != [BLOCK_COLUMNS, BLOCK_COLUMNS]:
        raise _refuse("weight_block_size", blocks, f"[{BLOCK_COLUMNS}, {BLOCK_COLUMNS}]")
    return Quantization("fp8 in blocks", Scaled(torch.float8_e4m3fn, blocks=True), left)


def _compressed_tensors(stored: dict[str, Any]) -> Quantization:
    groups = list((stored.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise _refuse("config_groups", [*(stored.get("config_groups") or {})], "a single group")
    [group] = groups
    if list(group.get("targets") or ["Linear"]) != ["Linear"]:
        raise _refuse("targets", group["targets"], "['Linear'] with an ignore list")
    left = _left(stored, "ignore")
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    if kind == "int" and bits == 4 and inputs is None:
        if weights.get("actorder"):
            raise _refuse("actorder", weights["actorder"], "none")
        if strategy != "group":
            raise _refuse("weights.strategy", strategy, "group")
        return Quantization("int4", Int4("packed", _group_size(weights), bool(weights.get("symmetric", True))), left)
    if bits != 8 or kind not in ("float", "int") or inputs is None or inputs.get("num_bits") != 8:
        raise _refuse("weights", f"{bits} bits ({kind}), inputs {inputs}", "8-bit weights and inputs, or 4-bit weights")
    static = not inputs.get("dynamic")
    if strategy == "block":
        if list(weights.get("block_structure") or []) != [BLOCK_COLUMNS, BLOCK_COLUMNS]:
            raise _refuse("block_structure", weights.get("block_structure"), f"[{BLOCK_COLUMNS}, {BLOCK_COLUMNS}]")
        return Quantization("fp8 in blocks", Scaled(torch.float8_e4m3fn, blocks=True), left)
    if strategy not in ("tensor", "channel"):
        raise _refuse("weights.strategy", strategy, "tensor, channel or block")
    if kind == "int" and (static or not weights.get("symmetric", True)):
        raise _refuse("int8 inputs", "static or asymmetric", "dynamic, symmetric, per token")
    dtype = torch.float8_e4m3fn if kind == "float" else torch.int8
    return Quantization("fp8" if kind == "float" else "int8", Scaled(dtype, static_inputs=static), left)


def _mxfp4(stored: dict[str, Any]) -> Quantization:
    return Quantization("mxfp4", MXFP4(), _left(stored, "modules_to_not_convert"))


def _awq(stored: dict[str, Any]) -> Quantization:
    if stored.get("bits", 4) != 4:
        raise _refuse("bits", stored["bits"], "4")
    if str(stored.get("version", "gemm")).lower() != "gemm":
        raise _refuse("version", stored["version"], "gemm")
    return Quantization("awq", Int4("awq", _group_size(stored)), _left(stored, "modules_to_not_convert"))


def _gptq(stored: dict[str, Any]) -> Quantization:
    if stored.get("bits", 4) != 4:
        raise _refuse("bits", stored["bits"], "4")
    offset = 0 if stored.get("checkpoint_format") == "gptq_v2" else 1
    return Quantization(
        "gptq", Int4("gptq", _group_size(stored), zero_offset=offset), _left(stored, "modules_to_not_convert")
    )

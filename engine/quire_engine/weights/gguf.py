"""GGUF files: the header is parsed here, with bounds (the `gguf` package's reader takes seconds and trusts the file);
quantized blocks are decoded by that package. Format: ggml's docs/gguf.md, versions 2 and 3."""

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire_engine.errors import ModelError
from quire_engine.weights.tensors import LazyTensor

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 24
READABLE = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)


@dataclass(frozen=True, slots=True)
class GGUFTensorInfo:
    """Where a tensor lies. `shape` in torch's order (rows first)."""

    name: str
    shape: tuple[int, ...]
    quantization: str
    offset: int
    num_bytes: int


class GGUFFile:
    """The metadata and the tensor table of one file. Raises ModelError for anything that is not a whole GGUF file."""

    def __init__(self, path: Path) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path.name} cannot be read: {error}") from error
        self._at = 0
        if self._map[:4] != b"GGUF":
            raise ModelError(f"{path.name} is not a GGUF file (its first bytes are not 'GGUF')")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ModelError(f"{path.name} has GGUF version {version}; versions 2 and 3 are read; convert it again")
        num_tensors, num_fields = self._count("<Q"), self._count("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        described = []
        for _ in range(num_tensors):
            name = self._string()
            dims = [self._scalar("<Q") for _ in range(self._count("<I", 8))]
            described.append((name, tuple(reversed(dims)), self._scalar("<I"), self._scalar("<Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"{path.name}: general.alignment is {alignment!r}; the file is corrupt")
        base = -(-self._at // alignment) * alignment
        self.tensors: dict[str, GGUFTensorInfo] = {}
        for name, shape, type_id, offset in described:
            try:
                kind = GGMLQuantizationType(type_id)
            except ValueError as error:
                raise ModelError(f"{path.name}: tensor {name} has unknown type {type_id}") from error
            block, size = GGML_QUANT_SIZES[kind]
            elements = int(np.prod(shape, dtype=object)) if shape else 1
            if not shape or shape[-1] % block:
                raise ModelError(f"{path.name}: tensor {name} of shape {list(shape)} is not made of {kind.name} blocks")
            num_bytes = elements // block * size
            if base + offset + num_bytes > len(self._map):
                raise ModelError(
                    f"{path.name} is truncated: tensor {name} ends at byte {base + offset + num_bytes} of "
                    f"{len(self._map)}; download it again"
                )
            self.tensors[name] = GGUFTensorInfo(name, shape, kind.name, base + offset, num_bytes)

    def read(self, info: GGUFTensorInfo, rows: slice) -> Tensor:
        """Rows of a tensor in fp32. Quantized blocks never cross a row, so only these rows are decoded."""
        from gguf import dequantize
        from gguf.constants import GGMLQuantizationType

        if info.quantization not in READABLE:
            raise ModelError(
                f"tensor {info.name} is in {info.quantization}; read are {', '.join(READABLE)}; quantize it so"
            )
        raw = np.frombuffer(self._map, np.uint8, info.num_bytes, info.offset).reshape(info.shape[0], -1)[rows]
        if info.quantization in ("F32", "F16"):
            raw = raw.view(np.float32 if info.quantization == "F32" else np.float16)
        values = dequantize(raw, GGMLQuantizationType[info.quantization])
        return torch.from_numpy(np.array(values, np.float32)).reshape(-1, *info.shape[1:])

    # ---- the header -----------------------------------------------------------------------------------------------

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._map):
            raise ModelError(
                f"{self.path.name} is truncated or corrupt: its header ends in the middle; download it again"
            )
        data = self._map[self._at : end]
        self._at = end
        return data

    def _scalar(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _count(self, code: str, most: int = _MAX_COUNT) -> int:
        count = self._scalar(code)
        if count > most:
            raise ModelError(f"{self.path.name} is corrupt: its header counts {count} entries; download it again")
        return count

    def _string(self) -> str:
        return self._take(self._count("<Q", 1 << 28)).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, count = self._scalar("<I"), self._count("<Q")
            if element in _SCALARS:
                code = _SCALARS[element]
                data = self._take(count * struct.calcsize(code))
                return list(struct.unpack(f"<{count}{code[1]}", data))
            return [self._value(element) for _ in range(count)]
        raise ModelError(f"{self.path.name} is corrupt: metadata of unknown type {kind}; download it again")


# ---- to Hugging Face's names and config ----------------------------------------------------------------------------

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The Hugging Face config that the metadata amounts to. Raises ModelError for an architecture not served."""
    meta = file.metadata
    arch = meta.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise ModelError(f"GGUF architecture {arch!r} is not served; served are {', '.join(sorted(_ARCHITECTURES))}")

    def need(key: str) -> Any:
        value = meta.get(f"{arch}.{key}")
        if value is None:
            raise ModelError(f"{file.path.name} lacks {arch}.{key} in its metadata; convert it again")
        return value

    heads = need("attention.head_count")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path.name} has no token_embd.weight; it is not a whole language model")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_size": need("embedding_length"),
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": meta.get(f"{arch}.attention.key_length", need("embedding_length") // heads),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": need("context_length"),
        "rope_theta": meta.get(f"{arch}.rope.freq_base", 10000.0),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "torch_dtype": "float32",
    }
    if window := meta.get(f"{arch}.attention.sliding_window"):
        config["sliding_window"] = window
    scaling = meta.get(f"{arch}.rope.scaling.type", "none")
    if scaling not in ("none", ""):
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": meta.get(f"{arch}.rope.scaling.factor", 1.0),
        }
    for ours, theirs in (("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id")):
        if (token := meta.get(f"tokenizer.ggml.{theirs}")) is not None:
            config[ours] = token
    return config


def _hugging_face_name(name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block and block[2] in _TENSORS:
        return f"model.layers.{block[1]}.{_TENSORS[block[2]]}.{kind}"
    return f"{_TENSORS[stem]}.{kind}" if stem in _TENSORS else None


class GGUFCheckpoint:
    """A GGUF file's tensors under their Hugging Face names."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        config = config_of(file)
        self._interleaved = file.metadata["general.architecture"] in ("llama", "mistral")
        self._heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        self._where = {_hugging_face_name(name) or name: info for name, info in file.tensors.items()}

    def names(self) -> list[str]:
        """All tensors; one that has no Hugging Face name keeps its own."""
        return list(self._where)

    def tensor(self, name: str) -> LazyTensor:
        """Raises ModelError for a name the file does not have."""
        info = self._where.get(name)
        if info is None:
            raise ModelError(f"the GGUF file has no tensor for {name}; is it whole?")
        heads = self._heads.get(name.split(".")[-2]) if self._interleaved else None

        def part(rows: slice, columns: slice) -> Tensor:
            if heads is None:
                whole = self._file.read(info, rows)
            else:
                whole = self._file.read(info, slice(None))[self._order(info, heads)][rows]
            return whole[:, columns] if whole.dim() > 1 else whole

        return LazyTensor(name, info.shape, part)

    @staticmethod
    def _order(info: GGUFTensorInfo, heads: int) -> Tensor:
        """llama.cpp interleaves each head's rotary pairs (0, 1), (2, 3), …; Hugging Face keeps halves."""
        rows = torch.arange(info.shape[0])
        return rows.view(heads, info.shape[0] // heads // 2, 2).transpose(1, 2).reshape(-1)

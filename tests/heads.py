"""Tiny heads that guess tokens ahead, in the formats that are published, and the engine's guesses by them."""

import json
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from conftest import make_checkpoint
from families import FAMILIES, LAYERS
from layouts import Tensors, rewritten
from quire_engine.layers.caches import empty_caches
from quire_engine.layers.linear import Builder
from quire_engine.models.decoder import Decoder
from quire_engine.models.draft_heads import DraftHead, eagle_head, mtp_head
from quire_engine.models.families import spec_of
from quire_engine.parallel import ParallelGroup
from quire_engine.quantization.config import quantization_of
from quire_engine.weights.resolve import ModelFiles
from quire_engine.weights.tensors import TensorReader
from quire_kernels.backends import AttentionBatch
from quire_kernels.torch_backend import TorchBackend
from torch import Tensor

HIDDEN = 64
VOCABULARY = 300
DRAFT_VOCABULARY = 90
GUESSES = 3
_PAGES = 8
CPU = torch.device("cpu")
CACHE: dict[str, Any] = {
    "num_pages": _PAGES,
    "block_size": 16,
    "dtype": torch.float32,
    "cache_dtype": torch.float32,
    "device": CPU,
}


@dataclass(frozen=True)
class Mtp:
    """A family's format: how it calls what transformers' model of one layer more has as its last layer."""

    family: str
    layer: str
    embedding_norm: str
    hidden_norm: str
    projection: str
    norm: str
    copies: tuple[tuple[str, str], ...] = ()  # tables that are stored twice
    hidden_first: bool = False
    unit_offset: bool = False
    architecture: str = ""


_BEHIND = f"model.layers.{LAYERS}"
_DEEPSEEK = {
    "layer": _BEHIND,
    "embedding_norm": f"{_BEHIND}.enorm",
    "hidden_norm": f"{_BEHIND}.hnorm",
    "projection": f"{_BEHIND}.eh_proj",
    "norm": f"{_BEHIND}.shared_head.norm",
    "copies": (
        ("model.embed_tokens", f"{_BEHIND}.embed_tokens"),
        ("lm_head", f"{_BEHIND}.shared_head.head"),
    ),
}
_QWEN: dict[str, Any] = {
    "layer": "mtp.layers.0",
    "embedding_norm": "mtp.pre_fc_norm_embedding",
    "hidden_norm": "mtp.pre_fc_norm_hidden",
    "projection": "mtp.fc",
    "norm": "mtp.norm",
    "unit_offset": True,
}
MTP = {
    "deepseek_v3": Mtp("deepseek_v3", **_DEEPSEEK),
    "glm4_moe": Mtp("glm4_moe", **_DEEPSEEK),
    "qwen3_next": Mtp("qwen3_next", **_QWEN),
    "qwen3_5": Mtp("qwen3_5", **_QWEN),
    "qwen3_5_moe": Mtp("qwen3_5_moe", **_QWEN),
    "mimo": Mtp(
        "qwen2",
        layer="model.mtp_layers.0",
        embedding_norm="model.mtp_layers.0.token_layernorm",
        hidden_norm="model.mtp_layers.0.hidden_layernorm",
        projection="model.mtp_layers.0.input_proj",
        norm="model.mtp_layers.0.final_layernorm",
        hidden_first=True,
        architecture="MiMoForCausalLM",
    ),
}


def mtp_folders(folder: Path, name: str, **sizes: int) -> tuple[Path, Path]:
    """transformers' model of one layer more, and the checkpoint with that layer as published."""
    mtp = MTP[name]
    changes: dict[str, Any] = {"num_hidden_layers": LAYERS + 1, **sizes}
    kinds = FAMILIES[mtp.family].facts.get("layer_types")
    if kinds:
        changes["layer_types"] = [*kinds, "full_attention"]
    if mtp.architecture:
        changes |= {"use_sliding_window": False, "tie_word_embeddings": False}
    plain = make_checkpoint(folder / "plain", mtp.family, **changes)

    def renamed(tensors: Tensors) -> Tensors:
        out = {key.replace(f"{_BEHIND}.", f"{mtp.layer}."): tensor for key, tensor in tensors.items()}
        norms = (mtp.embedding_norm, mtp.hidden_norm, mtp.norm)
        out |= {f"{norm}.weight": (0.0 if mtp.unit_offset else 1.0) + 0.2 * torch.randn(HIDDEN) for norm in norms}
        out[f"{mtp.projection}.weight"] = 0.1 * torch.randn(HIDDEN, 2 * HIDDEN)
        return out | {f"{copy}.weight": out[f"{original}.weight"].clone() for original, copy in mtp.copies}

    facts: dict[str, Any] = {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    if kinds:
        facts["layer_types"] = kinds
    if mtp.architecture:
        facts |= {"architectures": [mtp.architecture], "model_type": "mimo", "layer_types": None}
    return plain, rewritten(plain, folder / "published", renamed, **facts)


def eagle_folder(folder: Path, version: int, **facts: Any) -> Path:
    """A head on a model of HIDDEN dimensions and VOCABULARY tokens: a Llama of one layer, a few of its tensors others.
    `facts`: of its config."""
    own: dict[str, Any] = {"num_hidden_layers": 1, "rope_parameters": None, "attention_bias": False, "mlp_bias": False}
    own["initializer_range"] = 0.1  # its states are not normalized from guess to guess; they would grow
    plain = make_checkpoint(folder / "plain", "llama", **own)
    third = {"draft_vocab_size": DRAFT_VOCABULARY, "architectures": ["LlamaForCausalLMEagle3"]} if version == 3 else {}
    return rewritten(plain, folder / "published", _as_eagle_3 if version == 3 else _as_eagle, **(third | facts))


def _as_eagle(tensors: Tensors) -> Tensors:
    left = ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight")
    out = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name not in left and "input_layernorm" not in name
    }
    return out | {"fc.weight": 0.1 * torch.randn(HIDDEN, 2 * HIDDEN), "fc.bias": 0.1 * torch.randn(HIDDEN)}


def _as_eagle_3(tensors: Tensors) -> Tensors:
    out = {
        name.replace("model.layers.0.", "midlayer.").removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(("lm_head", "model.embed_tokens"))
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        rows = out[f"midlayer.self_attn.{name}.weight"].shape[0]
        out[f"midlayer.self_attn.{name}.weight"] = 0.1 * torch.randn(rows, 2 * HIDDEN)
    ids = torch.randperm(VOCABULARY)[:DRAFT_VOCABULARY].sort().values
    return out | {
        "midlayer.hidden_norm.weight": 1 + 0.2 * torch.randn(HIDDEN),
        "fc.weight": 0.1 * torch.randn(HIDDEN, 3 * HIDDEN),
        "lm_head.weight": 0.25 * torch.randn(DRAFT_VOCABULARY, HIDDEN),
        "d2t": ids - torch.arange(DRAFT_VOCABULARY),
        "t2d": torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True),
    }


def with_embeddings(tensors: Tensors) -> Tensors:
    return tensors | {"embed_tokens.weight": 0.25 * torch.randn(VOCABULARY, HIDDEN)}


def as_speculators(folder: Path, target: Path) -> Path:
    """An EAGLE-3 head as the library `speculators` writes it."""

    def renamed(tensors: Tensors) -> Tensors:
        return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}

    layer = json.loads((folder / "config.json").read_text())
    config = {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": DRAFT_VOCABULARY,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 3],
        "norm_before_residual": True,
        "speculators_model_type": "eagle3",
        "target_hidden_size": None,
        "transformer_layer_config": layer,
    }
    rewritten(folder, target, renamed)
    (target / "config.json").write_text(json.dumps(config))
    return target


def built(folder: Path, group: ParallelGroup, head: Path | None = None) -> tuple[Decoder, DraftHead]:
    """A model and the head on it: of the same checkpoint, or of a folder of its own."""
    files = ModelFiles(folder.name, folder)
    build = builder(files, group)
    spec = spec_of(files.config)
    model = Decoder(build, spec, spec.max_position)
    if head is None:
        return model, mtp_head(build, spec, model, spec.max_position, False)
    files = ModelFiles(head.name, head)
    return model, eagle_head(builder(files, group), files.config, spec, model, spec.max_position, False)


def builder(files: ModelFiles, group: ParallelGroup) -> Builder:
    weights = TensorReader(files.checkpoint(), torch.float32, CPU)
    return Builder(weights, group, TorchBackend(), quantization_of(files.config, None))


def places(begin: int, end: int) -> AttentionBatch:
    """Of one request, whose pages are the first ones."""
    return AttentionBatch(
        positions=torch.arange(begin, end, dtype=torch.int32),
        slots=torch.arange(begin, end),
        block_tables=torch.arange(_PAGES, dtype=torch.int32)[None],
        query_starts=torch.tensor([0, end - begin], dtype=torch.int32),
        longest_query=end - begin,
        context_lens=torch.tensor([end], dtype=torch.int32),
    )


@torch.inference_mode()
def guesses(head: DraftHead, group: ParallelGroup, tokens: list[int], states: Tensor, cut: int) -> list[Tensor]:
    """Logits of every place of a text and of the guesses behind it, of which each goes by its own last one. `states`:
    what the model gave. The text goes in two parts."""
    caches = empty_caches(
        head.spec,
        group,
        head.layers,
        num_states=0,
        **CACHE,
    )
    ids = torch.tensor(tokens, dtype=torch.int32)
    combined = head.combined(states)
    given = combined.clone()
    found, last = [], states
    for begin, end in ((0, cut), (cut, len(tokens))):
        if begin < end:
            last = head(ids[begin:end], combined[begin:end], places(begin, end), caches)
            found.append(head.logits(last))
    assert torch.equal(given, combined), "what the caller gave is changed"
    for place in range(len(tokens), len(tokens) + GUESSES):
        [token] = group_broadcast(group, None if found[-1] is None else drawn(head, found[-1]))
        last = head(torch.tensor([token], dtype=torch.int32), last[-1:], places(place, place + 1), caches)
        found.append(head.logits(last))
    return [logits for logits in found if logits is not None]


def drawn(head: DraftHead, logits: Tensor) -> list[int]:
    best = int(logits[-1].argmax())
    return [best if head.vocabulary is None else int(head.vocabulary[best])]


def group_broadcast(group: ParallelGroup, tokens: list[int] | None) -> list[int]:
    """Rank 0's."""
    if group.size == 1:
        assert tokens is not None
        return tokens
    sent = torch.tensor(tokens or [0], dtype=torch.float32)
    return [int(token) for token in group.all_reduce(sent if group.rank == 0 else torch.zeros(1)).tolist()]


def serve(rank: int, port: int, orders: Connection) -> None:
    """One of two tensor-parallel ranks: order after order (folder, head's folder, tokens, states), each answered with
    rank 0's logits, or with what went wrong."""
    torch.set_num_threads(1)
    group = ParallelGroup.join(rank, 2, 1, "127.0.0.1", port, CPU, dtype=torch.float32)
    while (order := orders.recv()) is not None:
        try:
            orders.send(_answer(group, *order))
        except Exception:  # the test shows it, whatever it is
            orders.send(traceback.format_exc())
    group.close()


def _answer(group: ParallelGroup, folder: Path, head: Path | None, tokens: list[int], states: Any) -> Any:
    made = built(folder, group, head)[1]
    return [logits.numpy() for logits in guesses(made, group, tokens, torch.from_numpy(states), 0)]

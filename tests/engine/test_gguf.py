"""Files that llama.cpp's own converter writes answer like the checkpoints they come from, for each of its architectures
that is served.

What its files cannot say (a window in Llama, which layers rotate) the tiny models are made without.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from conftest import make_checkpoint
from greedy import engine_for, prompts, run, truth
from layouts import MXFP4_CONFIG, as_internlm2, from_mxfp4, in_mxfp4, rewritten
from quire_engine.config import EngineConfig
from quire_engine.errors import ModelError
from quire_engine.text.tokenizer import Tokenizer, end_tokens
from quire_engine.weights.gguf.families import FAMILIES, config_of
from quire_engine.weights.gguf.file import GGUFFile
from quire_engine.weights.hf_config import completed
from quire_engine.weights.resolve import find_model, resolve
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("gguf")  # all are converted at once
BATCH = prompts()[:4]
# name → family, and what makes the tiny model one that its file can describe
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("arcee", {}),
    "bloom": ("bloom", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "layer_types": None}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "dots1": ("dots1", {"n_group": 1, "topk_group": 1}),
    "ernie": ("ernie", {"head_dim": 16}),
    "ernie_moe": ("ernie_moe", {}),
    "exaone4": ("exaone4", {}),
    "falcon_40b": ("falcon_40b", {}),
    "falcon_7b": ("falcon_7b", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 32, "num_hidden_layers": 7, "layer_types": None}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", {}),
    "gpt2": ("gpt2", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_oss": ("gpt_oss", {}),
    "granite": ("granite", {}),
    "granite_hybrid": ("granite_hybrid", {}),
    "granite_hybrid_moe": ("granite_hybrid_moe", {"position_embedding_type": None}),
    "granite_moe": ("granite_moe", {}),
    "granite_moe_shared": ("granite_moe_shared", {}),
    "hunyuan": ("hunyuan", {}),
    "lfm2": ("lfm2", {}),
    "lfm2_moe": ("lfm2_moe", {"conv_bias": False}),
    "llama": ("llama", {}),
    "mamba2": ("mamba2", {"intermediate_size": 128}),
    "mistral": ("mistral", {"sliding_window": None}),
    "minimax_m2": ("minimax_m2", {}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "mpt": ("mpt", {}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "olmoe": ("olmoe", {"clip_qkv": None}),
    "phi": ("phi", {"intermediate_size": 256, "num_key_value_heads": 4}),
    "phi3": ("phi3", {}),
    "phi3_long": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + i / 8 for i in range(8)],
                "long_factor": [2.0 + i for i in range(8)],
                "original_max_position_embeddings": 64,
            },
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen2_moe": ("qwen2_moe", {"decoder_sparse_step": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3_5": ("qwen3_5", {}),
    "qwen3_5_moe": ("qwen3_5_moe", {}),
    "qwen3_next": ("qwen3_next", {}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": None}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
}
# Fields of published configs that transformers' config classes leave out or rename, and the converter reads.
PUBLISHED = {
    "cohere2": {"rotary_pct": 1.0},
    "falcon_7b": {"num_kv_heads": 1},
    "glm": {"seq_length": 512},
    "gpt2": {"n_ctx": 512},
    "gpt_neox": {"rotary_pct": 0.5},
    "granite_hybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "granite_hybrid_moe": {"layer_types": ["mamba", "attention", "mamba"]},
    "mpt": {"architectures": ["MPTForCausalLM"]},
}
LIKE: dict[str, str] = {"internlm2": "llama_plain", "mxfp4": "mxfp4_plain"}  # its file → the checkpoint it equals


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a checkpoint and a file of each."""
    folder = tmp_path_factory.mktemp("gguf")
    for name, (family, changes) in WRITTEN.items():
        source = make_checkpoint(folder / name, family, **changes)
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | PUBLISHED.get(name, {})))
    plain = make_checkpoint(folder / "llama_plain", "llama", attention_bias=False, mlp_bias=False, rope_parameters=None)
    rewritten(
        plain,
        folder / "internlm2",
        as_internlm2,
        architectures=["InternLM2ForCausalLM"],
        model_type="internlm2",
        bias=False,
    )
    rewritten(folder / "gpt_oss", folder / "mxfp4", in_mxfp4, **MXFP4_CONFIG)
    rewritten(folder / "mxfp4", folder / "mxfp4_plain", from_mxfp4, quantization_config=None)
    converted = [str(folder / name) for name in (*WRITTEN, *LIKE)]
    done = subprocess.run([sys.executable, llama_cpp.__file__, *converted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", [*WRITTEN, *LIKE])
def test_files_answer_like_their_checkpoints(folder: Path, name: str) -> None:
    batch = prompts()[4:] if name == "phi3_long" else BATCH  # its factors change with the length
    engine = engine_for(folder / f"{name}.gguf", max_model_len=256)  # some say that they have no bound
    assert run(engine, batch) == truth(folder / LIKE.get(name, name), batch)


def test_every_architecture_is_written(folder: Path) -> None:
    """MISTRAL is a name of older files; Mistral's converter writes llama."""
    written = {find_model(EngineConfig(model=str(file))).gguf for file in folder.glob("*.gguf")}
    found = {file.metadata["general.architecture"] for file in written if file is not None}
    assert set(FAMILIES) - found == {"mistral"}


def test_every_file_has_its_tokenizer(folder: Path) -> None:
    for name in (*WRITTEN, *LIKE):
        files = resolve(str(folder / f"{name}.gguf"))
        tokenizer = Tokenizer.load(files)
        text = " A naïve café\n— 你好 🌍"
        tokens = tokenizer.encode(text)
        assert max(tokens) > 3 + 256, "spaces are merged with what follows"
        assert tokenizer.decode(tokens) == text
        assert end_tokens(files, tokenizer) == (2,)


def changed(folder: Path, name: str, changes: dict[str, Any]) -> GGUFFile:
    """A file's header with other metadata; `arch.` in keys is its architecture."""
    file = GGUFFile(folder / f"{name}.gguf")
    arch = file.metadata["general.architecture"]
    for key, value in changes.items():
        file.metadata[key.replace("arch.", f"{arch}.")] = value
    return file


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "arch.feed_forward_length", [96, 96, 64]),
        ("llama", "arch.attention.head_count", [4, 2, 4]),
        ("llama", "arch.attention.head_count_kv", [2, 0, 2]),
        ("llama", "arch.attention.head_count_kv", [2, 2]),
        ("llama", "arch.attention.sliding_window", 64),
        ("llama", "arch.attention.sliding_window_pattern", [True, False, True]),
        ("llama", "arch.attention.temperature_scale", 0.1),
        ("llama", "arch.attention.clamp_kqv", 8.0),
        ("llama", "arch.attention.causal", False),
        ("llama", "arch.logit_scale", 0.25),
        ("llama", "arch.final_logit_softcapping", 30.0),
        ("llama", "arch.embedding_length", "wide"),
        ("llama", "arch.rope.dimension_count", 8),
        ("llama", "arch.rope.freq_base_swa", 500.0),
        ("llama", "arch.rope.scaling.type", "dynamic"),
        ("llama", "arch.rope.scaling.attn_factor", 1.2),
        ("llama", "arch.rope.scaling.alpha", 1000.0),
        ("llama", "arch.rope.something_new", 1),
        ("lfm2", "arch.attention.head_count_kv", [0, 2, 1]),
        ("gemma2", "arch.attention.sliding_window_pattern", [True, False]),
        ("qwen3_moe", "arch.expert_gating_func", 2),
        ("qwen3_moe", "arch.expert_weights_norm", False),
        ("lfm2_moe", "arch.expert_gating_func", 1),
        ("qwen3_5", "arch.nextn_predict_layers", 1),
        ("olmoe", "arch.expert_group_count", 4),
    ],
)
def test_what_is_not_understood_is_refused_by_name(folder: Path, name: str, key: str, value: Any) -> None:
    file = changed(folder, name, {key: value})
    named = key.replace("arch.", f"{file.metadata['general.architecture']}.")
    with pytest.raises(ModelError, match=re.escape(named)):
        config_of(file)


def test_what_nobody_knows_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config_of(changed(folder, "llama", {"arch.vocab_size": 300, "arch.rope.freq_base_swa": 10000.0}))
    assert not caplog.messages
    config_of(changed(folder, "llama", {"arch.colour": "red"}))
    assert caplog.messages == ["llama.gguf: llama.colour is not understood and has no effect"]


def test_what_files_say_layer_by_layer(folder: Path) -> None:
    """Lists of equal values are one value."""
    plain = config_of(changed(folder, "llama", {}))
    lists = {"arch.attention.head_count_kv": [2] * 3, "arch.feed_forward_length": [plain["intermediate_size"]] * 3}
    assert config_of(changed(folder, "llama", lists)) == plain
    windows = {"arch.attention.sliding_window": 64, "arch.attention.sliding_window_pattern": [False, True, True]}
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    for name in ("gemma2", "gpt_oss", "olmo3"):
        assert config_of(changed(folder, name, windows))["layer_types"] == kinds
    every = config_of(changed(folder, "gemma2", {"arch.attention.sliding_window_pattern": 3}))
    assert every["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    unsaid = changed(folder, "gemma2", {})
    del unsaid.metadata["gemma2.attention.sliding_window"]
    older = completed(config_of(unsaid))
    assert older["sliding_window"] == 4096
    assert older["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]


def test_older_names_of_linear_scaling(folder: Path) -> None:
    for changes in ({"arch.rope.scaling.factor": 4.0}, {"arch.rope.scale_linear": 4.0}):
        config = config_of(changed(folder, "qwen3", {"arch.rope.scaling.type": "linear"} | changes))
        assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
        assert config_of(changed(folder, "qwen3", changes)) == config, "linear is what scaling is by default"


def test_a_part_of_each_head_turns(folder: Path) -> None:
    """As in Phi-4-mini."""
    assert config_of(changed(folder, "phi3", {"arch.rope.dimension_count": 12}))["partial_rotary_factor"] == 12 / 16


def test_a_model_in_several_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(folder / "qwen3")
    done = subprocess.run(
        [sys.executable, llama_cpp.__file__, "--split", "12", str(tmp_path / "model")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 3
    (tmp_path / "model").unlink()
    expected = truth(folder / "qwen3", BATCH)
    for named in (tmp_path, files[0]):
        assert resolve(str(named)).name == "model"
        assert run(engine_for(named), BATCH) == expected
    with pytest.raises(ModelError, match="is a later part of a model in 3 files; give the first"):
        engine_for(files[1])
    files[2].unlink()
    with pytest.raises(ModelError, match=r"00003-of-00003\.gguf cannot be read"):
        engine_for(files[0])
    with pytest.raises(ModelError, match="holds 2 GGUF files"):
        engine_for(tmp_path)


def test_older_files_of_stablelm_12b(tmp_path: Path) -> None:
    """Norms of each head. (The converter of today drops them.)"""
    source = make_checkpoint(tmp_path / "source", "stablelm_parallel")
    weights = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    layers = config["num_hidden_layers"]
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "stablelm")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(4)
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_parallel_residual(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STABLELM, layers)
    norms: dict[str, list[np.ndarray]] = {}
    for name, tensor in sorted(weights.items()):
        stem, _, kind = name.rpartition(".")
        if ".norms." in stem:
            norms.setdefault(f"{names.get_name(stem.partition('.norms.')[0])}.{kind}", []).append(tensor.numpy())
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{kind}", tensor.numpy())
    for name, parts in norms.items():
        writer.add_tensor(name, np.stack(parts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run(engine_for(tmp_path / "model.gguf"), BATCH) == truth(source, BATCH)


def test_an_architecture_that_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "mamba")
    writer.add_tensor("x.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba' is not served; served are arcee, bloom"):
        engine_for(path)

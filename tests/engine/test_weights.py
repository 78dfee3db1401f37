"""Reading checkpoints: what is right is read right, and what is wrong is refused with the reason."""

import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from greedy import engine_for, prompt_logits
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.errors import InvalidParameter, ModelError, OutOfMemory
from quire_engine.execution.runner import ModelRunner
from quire_engine.request import EngineSampling, Request
from quire_engine.weights.gguf.checkpoint import GGUFCheckpoint
from quire_engine.weights.gguf.file import READABLE, GGUFFile
from quire_engine.weights.random import RandomWeights
from quire_engine.weights.resolve import resolve
from quire_engine.weights.tensors import SafetensorsCheckpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

Make = Callable[[str], Path]
WRITABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # by the package


def greedy(folder: Path, prompt: list[int], count: int = 12) -> list[int]:
    config = EngineConfig(model=str(folder), kv_cache_memory_bytes=8 << 20)
    engine = Engine(ModelRunner(config, resolve(str(folder))))
    request = Request(1, list(prompt), len(prompt), EngineSampling(temperature=0.0, max_tokens=count))
    engine.add(request)
    while engine.has_work:
        engine.step()
    return request.tokens[len(prompt) :]


def copy(source: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_sharded_safetensors(checkpoint: Make, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert greedy(tmp_path, [5, 6, 7]) == greedy(folder, [5, 6, 7])
    next(iter(sorted(tmp_path.glob("model-*.safetensors")))).unlink()
    with pytest.raises(ModelError, match="lacks model-00001"):
        SafetensorsCheckpoint(tmp_path)


def sharded(checkpoint: Make, folder: Path) -> dict[str, str]:
    """→ its index."""
    AutoModelForCausalLM.from_pretrained(checkpoint("llama")).save_pretrained(folder, max_shard_size="100KB")
    index: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return index


def test_what_is_beside_a_checkpoint_is_not_read(checkpoint: Make, tmp_path: Path) -> None:
    """Stale shards of the same tensors, an adapter, another format, a GGUF file."""
    index = sharded(checkpoint, tmp_path)
    stale = {
        name: torch.full_like(tensor, 3.0) for name, tensor in load_file(tmp_path / index["lm_head.weight"]).items()
    }
    (tmp_path / "original").mkdir()
    for name in (
        "model-00099-of-00099.safetensors",
        "model.safetensors",
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "original/model.safetensors",
        "zzz.safetensors",
    ):
        save_file(stale, tmp_path / name)
    last = max(index.values())  # each tensor is read from its own file, wherever else it lies
    save_file(stale | load_file(tmp_path / last), tmp_path / last)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert greedy(tmp_path, [5, 6, 7]) == greedy(checkpoint("llama"), [5, 6, 7])


def test_files_without_an_index(checkpoint: Make, tmp_path: Path) -> None:
    expected = greedy(checkpoint("llama"), [5, 6, 7])
    index = sharded(checkpoint, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    for name in ("adapter_model.safetensors", "consolidated.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    assert greedy(tmp_path, [5, 6, 7]) == expected
    lost = tmp_path / min(index.values())
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ModelError, match=f"lacks {lost.name}"):
        SafetensorsCheckpoint(tmp_path)
    lost.write_bytes(kept)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"which of .*other\.safetensors are the checkpoint is not known without"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "other.safetensors").unlink()
    save_file(load_file(tmp_path / max(index.values())), lost)
    with pytest.raises(ModelError, match="is in several of"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "weights.safetensors").write_bytes((checkpoint("llama") / "model.safetensors").read_bytes())
    (tmp_path / "one" / "._weights.safetensors").write_bytes(b"what macOS leaves beside it")
    assert "model.norm.weight" in SafetensorsCheckpoint(tmp_path / "one").names()


def test_an_index_may_name_what_was_left_out(checkpoint: Make, tmp_path: Path) -> None:
    """Converters of pickles drop a tied head from the files, and keep its name in the index."""
    index = sharded(checkpoint, tmp_path)
    named = index | {"model.extra": index["model.norm.weight"]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    assert set(SafetensorsCheckpoint(tmp_path).names()) == set(index)


def test_an_index_that_is_wrong(checkpoint: Make, tmp_path: Path) -> None:
    index = sharded(checkpoint, tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    file = index["model.norm.weight"]
    other = next(name for name in index.values() if name != file)
    for changed, named in (
        (index | {"model.norm.weight": other}, f"{other} lacks the tensor model.norm.weight"),
        (index | {"model.norm.weight": "model-9.safetensors"}, "lacks model-9.safetensors"),
        (index | {"model.norm.weight": "../model.safetensors"}, "names '../model.safetensors'"),
        ({name: file for name, file in index.items() if name != "model.norm.weight"}, r"no tensor model\.norm\.weight"),
        ([], "is not a safetensors index"),
    ):
        path.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ModelError, match=named):
            greedy(tmp_path, [5])
    path.write_text(json.dumps({"weight_map": index}))
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-8])
    with pytest.raises(ModelError, match=f"{file} is not a whole safetensors file"):
        greedy(tmp_path, [5])


@pytest.mark.parametrize("stored", ["both", "embeddings", "head", "apart", "within"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "afmoe"])
def test_tied_weights(checkpoint: Make, tmp_path: Path, family: str, stored: str) -> None:
    """Under either name or both; and a head of its own, against the config: as transformers reads them."""
    folder = copy(checkpoint(family), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    embedding = next(name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight")))
    head = weights[embedding].flip(0).contiguous() if stored == "apart" else weights[embedding].clone()
    weights["lm_head.weight"] = head
    if stored in ("embeddings", "head"):
        del weights["lm_head.weight" if stored == "embeddings" else embedding]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = [7, 8, 9, 40]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    if stored == "within":  # as published GPT-2s have it: without the name of the model within, here beside a head
        weights = {name if name == "lm_head.weight" else name.partition(".")[2]: weights[name] for name in weights}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    [got] = prompt_logits(engine_for(folder), [prompt])
    assert (got - expected).abs().max() < 1e-4


def test_slices_are_read_as_they_are(tmp_path: Path) -> None:
    whole = torch.randn(12, 8)
    save_file({"w": whole, "b": torch.arange(12.0)}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert torch.equal(checkpoint.tensor("w").read(slice(3, 6), slice(2, 4)), whole[3:6, 2:4])
    assert torch.equal(checkpoint.tensor("b").read(slice(3, 6)), torch.arange(3.0, 6.0))


@pytest.mark.parametrize("keep", [0, 4, 50, 5000])
def test_truncated_safetensors(checkpoint: Make, tmp_path: Path, keep: int) -> None:
    folder = copy(checkpoint("llama"), tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
        greedy(folder, [5])


def test_wrong_weights(checkpoint: Make, tmp_path: Path) -> None:
    folder = copy(checkpoint("llama"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({n: w for n, w in weights.items() if n != "model.norm.weight"}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"no tensor model\.norm\.weight"):
        greedy(folder, [5])
    save_file({f"_orig_mod.{name}": weight for name, weight in weights.items()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"it has _orig_mod\.model\.embed_tokens\.weight: rename its tensors"):
        greedy(folder, [5])
    save_file(weights | {"model.layers.0.extra": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="does not use"):
        greedy(folder, [5])
    save_file(weights | {"model.norm.weight": torch.zeros(7)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"has shape \[7\], the config asks for \[64\]"):
        greedy(folder, [5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "model.safetensors is not a whole"),
        (lambda file: file.rename(file.with_suffix(".bin")), "only pickled weights"),
        (
            lambda file: save_file(load_file(file) | {"model.norm.weight": torch.zeros(7)}, file),
            r"norm\.weight has shape \[7\], the config asks for \[64\]",
        ),
    ],
)
def test_broken_weights_of_what_transformers_code_computes(
    checkpoint: Make, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = copy(checkpoint("apertus"), tmp_path)
    change(folder / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        engine_for(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["NoSuchModel"], "model_type": "none"}, r"'NoSuchModel'\]; served are .*LlamaForCausalLM"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "strange", "rope_theta": 1e4}}, "rope_type 'strange'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config asks for 'bitsandbytes'"),
        ({"hidden_size": None}, "is not one of llama in transformers.*hidden_size"),
    ],
)
def test_configs_that_are_not_served(checkpoint: Make, tmp_path: Path, change: dict, message: str) -> None:
    folder = copy(checkpoint("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        greedy(folder, [5])


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "content",
    [None, b"", b"[]", b"[" * 100_000, b'{"\xe9": 1}', b"\xef\xbb\xbf{}", b"version https://git-lfs.github.com"],
)
def test_what_is_no_json_is_named(checkpoint: Make, tmp_path: Path, name: str, content: bytes | None) -> None:
    """`None`: a folder where the file belongs."""
    folder = copy(checkpoint("llama"), tmp_path)
    path = folder / name
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(name) + " (is|of|cannot|begins)"):
        files = resolve(str(folder))
        _ = files.config, files.generation_config, files.checkpoint()


def test_what_is_no_whole_checkpoint_is_named(checkpoint: Make, tmp_path: Path) -> None:
    folder = copy(checkpoint("llama"), tmp_path)
    weights = folder / "model.safetensors"
    weights.rename(folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="an adapter"):
        resolve(str(folder)).checkpoint()
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        resolve(str(folder)).checkpoint()
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ModelError, match="adapter: merge it"):
        _ = resolve(str(folder)).config


def test_the_hubs_cache(checkpoint: Make, tmp_path: Path) -> None:
    """Links into its blobs, all of it readable alone; and the folder above, which is none of a checkpoint."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    copy(checkpoint("llama"), blobs)
    for number, file in enumerate(sorted(blobs.iterdir())):
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
        file.rename(blobs / f"{number:064x}").chmod(0o444)
    snapshot.chmod(0o555)
    assert greedy(snapshot, [5, 6, 7]) == greedy(checkpoint("llama"), [5, 6, 7])
    with pytest.raises(ModelError, match="a folder of the hub's cache: give snapshots/abc in it"):
        _ = resolve(str(snapshot.parent.parent)).config
    snapshot.chmod(0o755)


def test_pickles_are_refused(checkpoint: Make, tmp_path: Path) -> None:
    """And never opened: the file would leave a mark."""
    folder = copy(checkpoint("llama"), tmp_path)
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (mark,))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    for given in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(ModelError, match="convert"):
            resolve(str(given)).checkpoint()
    assert not mark.exists()


def test_references_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="there is no model at"):
        resolve("/nowhere/at/all")
    with pytest.raises(ModelError, match=r"no config\.json"):
        _ = resolve(str(tmp_path)).config
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        _ = resolve(str(tmp_path)).config
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(ModelError, match="neither a folder nor"):
        resolve(str(tmp_path / "x.zip"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not on this machine and could not be fetched"):
        resolve("nobody/no-such-model", download_dir=str(tmp_path))


def test_what_does_not_fit_is_said_before_it_is_loaded(checkpoint: Make) -> None:
    folder = checkpoint("llama")
    with pytest.raises(OutOfMemory, match="max-model-len"):
        ModelRunner(EngineConfig(model=str(folder), kv_cache_memory_bytes=100_000), resolve(str(folder)))
    with pytest.raises(InvalidParameter, match="the model's context is 512"):
        ModelRunner(EngineConfig(model=str(folder), max_model_len=1000), resolve(str(folder)))
    with pytest.raises(InvalidParameter, match="block_size"):
        EngineConfig(model="x", block_size=0)


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, source: Path, quantization: str, architecture: str) -> dict[str, torch.Tensor]:
    """The checkpoint as a GGUF file; returns what its tensors are worth after quantization, under their GGUF names."""
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_array("tokenizer.ggml.tokens", [f"w{i}" for i in range(config["vocab_size"])])
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config["num_hidden_layers"])
    kind = gguf.GGMLQuantizationType[quantization]
    worth: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        stem, _, suffix = name.rpartition(".")
        array = weight.numpy()
        if architecture == "llama" and (".q_proj" in name or ".k_proj" in name):
            heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
            array = (
                array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
                .swapaxes(1, 2)
                .reshape(array.shape)
            )
        written = f"{names.get_name(stem)}.{suffix}"
        plain = array.ndim == 1
        data = array if plain else gguf.quantize(array, kind)
        writer.add_tensor(written, np.ascontiguousarray(data), raw_dtype=None if plain else kind)
        worth[written] = torch.from_numpy(np.array(array if plain else gguf.dequantize(data, kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth


@pytest.mark.parametrize("quantization", WRITABLE)
def test_gguf_tensors(checkpoint: Make, tmp_path: Path, quantization: str) -> None:
    worth = write_gguf(tmp_path / "m.gguf", checkpoint("qwen3"), quantization, "qwen3")
    file = GGUFFile(tmp_path / "m.gguf")
    for name, expected in worth.items():
        info = file.tensors[name]
        assert torch.equal(torch.from_numpy(file.read(info, slice(None))), expected)
        assert torch.equal(torch.from_numpy(file.read(info, slice(3, 9))), expected[3:9])


@pytest.mark.parametrize(("family", "architecture"), [("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_gguf_models_answer_like_their_safetensors(
    checkpoint: Make, tmp_path: Path, family: str, architecture: str
) -> None:
    """Unquantized, so that not a token may differ. Within 24 tokens no window matters, which GGUF's llama lacks."""
    write_gguf(tmp_path / "m.gguf", checkpoint(family), "F32", architecture)
    prompt = [5, 17, 30, 99, 7]
    assert greedy(tmp_path / "m.gguf", prompt) == greedy(checkpoint(family), prompt)


def test_other_blocks_are_read_by_rows(tmp_path: Path) -> None:
    """The package cannot write them all; any bytes are valid blocks, and rows must be where the whole has them."""
    for name in (name for name in READABLE if name not in WRITABLE):
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = np.random.default_rng(0).integers(0, 120, (6, 2 * size), dtype=np.uint8)
        writer = gguf.GGUFWriter(str(tmp_path / name), "llama")
        writer.add_tensor("x.weight", raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file = GGUFFile(tmp_path / name)
        info = file.tensors["x.weight"]
        assert info.shape == (6, 2 * block)
        expected = torch.from_numpy(gguf.dequantize(raw, kind))
        assert torch.equal(torch.from_numpy(file.read(info, slice(2, 4))).nan_to_num(), expected[2:4].nan_to_num())


def test_broken_gguf(checkpoint: Make, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, checkpoint("qwen3"), "Q8_0", "qwen3")
    whole = path.read_bytes()
    for keep in (0, 3, 4, 8, 20, 100, 1000, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:keep])
        with pytest.raises(ModelError, match=r"cannot be read|not a GGUF|truncated|corrupt"):
            GGUFCheckpoint(GGUFFile(path))
    path.write_bytes(b"GGUF" + struct.pack("<I", 9) + whole[8:])
    with pytest.raises(ModelError, match="version 9"):
        GGUFFile(path)
    path.write_bytes(whole[:8] + struct.pack("<Q", 2**60) + whole[16:])
    with pytest.raises(ModelError, match="corrupt"):
        GGUFFile(path)
    generator = np.random.default_rng(0)
    for _ in range(300):  # flipped bytes in the header: read or refused, never anything else
        broken = bytearray(whole)
        for at in generator.integers(0, 600, 3):
            broken[at] = generator.integers(0, 256)
        path.write_bytes(broken)
        try:
            checkpoint_ = GGUFCheckpoint(GGUFFile(path))
        except ModelError:
            continue
        assert checkpoint_.names()


def test_random_weights_are_those_of_their_name() -> None:
    """Whatever was read before, and whichever part: ranks and devices agree."""
    shapes = {"a": (300, 70), "b": (300, 70), "c": (4, 30, 50), "d": (1600000,)}
    cpu, slice_of = torch.device("cpu"), (slice(2, 4), slice(10, 30), slice(5, 6))
    one, other = RandomWeights(torch.bfloat16, cpu), RandomWeights(torch.bfloat16, cpu)
    found = {name: one.take(name, shape) for name, shape in shapes.items()}
    for name, shape in reversed(shapes.items()):
        for dtype in (torch.bfloat16, torch.int32, torch.uint8, torch.float8_e4m3fn):
            whole = one.take(name, shape, dtype=dtype).float()
            cut = slice_of[: len(shape)]
            assert torch.equal(other.take(name, shape, *cut, dtype=dtype).float(), whole[cut])
        assert torch.equal(other.take(name, shape), found[name])
        assert 0.0399 < found[name].float().abs().max() < 0.0401
        assert abs(found[name].float().mean()) < 1e-3
    assert not torch.equal(found["a"], found["b"])
    rows = found["a"].unique(dim=0)
    assert rows.shape[0] == 300

"""Images as models see them: prompts, pixels and embeddings as transformers makes them of a whole conversation."""

import dataclasses
import json
import logging
import re
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from greedy import engine_for
from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.models import vision
from quire_engine.models.vision import TransformersTower, VisionTower, vision_tower
from quire_engine.models.vit import Vit
from quire_engine.multimodal.processor import ImageProcessor, ProcessedImage
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import ModelFiles, resolve
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vlm_families import NATIVE
from vlms import VLMS, make_vlm, picture

CPU = torch.device("cpu")
SIZES = [(90, 70), (64, 64), (40, 160), (200, 60), (20, 24)]
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is red?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "The second."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And of"}, {"type": "image"}]},
]


@dataclass
class Made:
    """One family's tiny model, and ours from its files."""

    whole: Any
    files: ModelFiles
    processor: ImageProcessor

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.files.folder / "config.json").read_text())

    def tower(self, folder: Path | None, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> VisionTower:
        return vision_tower(self.config, folder, dtype, device)

    @property
    def transformers_s(self) -> Any:
        """transformers' processor."""
        return self.processor._processor

    def features(self, inputs: dict[str, Any]) -> Any:
        """By the whole model, of a batch."""
        seen = {name: value for name, value in inputs.items() if name.startswith(("pixel_", "image_"))}
        with torch.no_grad():
            return self.whole.model.get_image_features(**seen)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    known: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            whole = make_vlm(name, folder)
            files = resolve(str(folder))
            known[name] = Made(whole, files, ImageProcessor.load(files))
        return known[name]

    return make


@pytest.fixture(params=["ours", "transformers"])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose computes the images."""
    if request.param == "transformers":
        monkeypatch.setattr(vision, "vit_spec", lambda config: None)
    return str(request.param)


def pictures(count: int = 4) -> list[Any]:
    return [picture(seed, *size) for seed, size in enumerate(SIZES[:count])]


def joined(features: Tensor | Sequence[Tensor]) -> Tensor:
    parts = [features] if isinstance(features, Tensor) else features
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def prompt(text: str, placeholder: str, images: Sequence[ProcessedImage]) -> str:
    """Each placeholder's image in its place; a replacement may have the placeholder in it."""
    first, *rest = text.split(placeholder)
    return first + "".join(image.replacement + after for image, after in zip(images, rest, strict=True))


@pytest.mark.parametrize("name", VLMS)
@pytest.mark.usefixtures("code")
def test_as_transformers_makes_of_a_whole_conversation(made: Callable[[str], Made], name: str) -> None:
    """Prompt, pixels, embeddings and what goes to later layers; image by image, and all at once there. Embeddings are
    numbers about 1: equal within 1e-5 of that, and of their own size."""
    one = made(name)
    own = one.transformers_s
    images = [one.processor.process(image) for image in pictures()]
    text = own.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text.count(one.processor.placeholder) == 4
    whole = own(text=[text], images=pictures(), return_tensors="pt", add_special_tokens=False)

    ids = Tokenizer.load(one.files).encode(prompt(text, one.processor.placeholder, images), add_special_tokens=False)
    assert ids == whole["input_ids"][0].tolist()
    assert one.processor.image_token_id == one.whole.config.image_token_id
    assert ids.count(one.processor.image_token_id) == sum(image.num_tokens for image in images)
    has_grid = "image_grid_thw" in whole
    assert [image.rows * image.columns for image in images] == [image.num_tokens * has_grid for image in images]

    tower = one.tower(one.files.folder)
    seen = [tower.encode(image.inputs) for image in images]
    assert [len(features.embeddings) for features in seen] == [image.num_tokens for image in images]
    theirs = one.features(dict(whole))
    torch.testing.assert_close(
        torch.cat([features.embeddings for features in seen]), joined(theirs.pooler_output), atol=1e-5, rtol=1e-5
    )
    deepstack = getattr(theirs, "deepstack_features", [])
    assert len(deepstack) == (2 if name.startswith("qwen3_vl") else 0)
    for layer, expected in enumerate(deepstack):
        got = torch.cat([features.deepstack[layer] for features in seen])
        torch.testing.assert_close(got, joined(expected), atol=1e-5, rtol=1e-5)
    assert {len(features.deepstack) for features in seen} == {len(deepstack)}


@pytest.mark.parametrize("name", VLMS)
def test_a_picture_is_seen(made: Callable[[str], Made], name: str) -> None:
    """By the tiny models: else tests of images would prove nothing."""
    one = made(name)
    logits = []
    for seed in (1, 2):
        text = f"a {one.processor.placeholder} b"
        inputs = one.transformers_s(text=[text], images=[picture(seed, 80, 80)], return_tensors="pt")
        with torch.no_grad():
            logits.append(one.whole(**inputs).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1.0


@pytest.mark.parametrize("name", VLMS)
@pytest.mark.usefixtures("code")
def test_the_tower_alone_is_built(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    """And read: a checkpoint without any text will do. What is to be quantized is the text. Without numbers it is as
    large, and without a checkpoint the same wherever it is made."""
    one = made(name)
    image = one.processor.process(picture(5, 96, 64))
    expected = one.tower(one.files.folder).encode(image.inputs).embeddings
    stored = load_file(one.files.folder / "model.safetensors")
    of_text = r"(model\.)?(language_model|text_model|layers|embed_tokens|norm)\b|lm_head"
    seen = {key: value for key, value in stored.items() if not re.match(of_text, key)}
    assert 0 < len(seen) < len(stored)
    save_file(seen, tmp_path / "model.safetensors")
    quantized = one.config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    tower = vision_tower(quantized, tmp_path, torch.float32, CPU)
    assert tower.encode(image.inputs).embeddings.equal(expected)
    count = sum(value.numel() for value in seen.values())
    assert tower.num_parameters == (count if isinstance(tower, TransformersTower) else read_by(one, image))
    assert tower.num_parameters <= count

    shapes = one.tower(None, torch.bfloat16, torch.device("meta"))
    first, second = (one.tower(None, torch.bfloat16) for _ in range(2))
    assert shapes.num_parameters == first.num_parameters == tower.num_parameters
    assert 2 * shapes.num_parameters <= shapes.weight_bytes == first.weight_bytes
    drawn = first.encode(image.inputs).embeddings
    assert drawn.isfinite().all()
    assert drawn.std() > 0
    assert drawn.equal(second.encode(image.inputs).embeddings)


def read_by(one: Made, image: ProcessedImage) -> int:
    """Parameters on which what is made of an image depends."""
    tensors = {name: torch.from_numpy(value) for name, value in image.inputs.items()}
    out = one.whole.model.get_image_features(**tensors)
    sum(joined(one).sum() for one in (out.pooler_output, *getattr(out, "deepstack_features", []))).backward()
    count = sum(parameter.numel() for parameter in one.whole.parameters() if parameter.grad is not None)
    one.whole.zero_grad(set_to_none=True)
    return count


@pytest.mark.parametrize("name", VLMS)
def test_which_code_computes_a_family(made: Callable[[str], Made], name: str) -> None:
    kind = Vit if name in NATIVE else TransformersTower
    assert type(made(name).tower(None, device=torch.device("meta"))) is kind


GRIDS = [(1, 4, 4), (1, 2, 14), (1, 10, 18), (3, 6, 10)]


def patches(grid: tuple[int, int, int], size: int) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0).normal(size=(int(np.prod(grid)), size))
    return {"pixel_values": numbers.astype(np.float32), "image_grid_thw": np.array([grid])}


def images(*shape: int, **more: Any) -> dict[str, np.ndarray]:
    found = {"pixel_values": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    return found | {name: np.array(value) for name, value in more.items()}


def padded() -> np.ndarray:
    mask = np.ones((1, 3, 32, 32), np.int64)
    mask[0, 1, 20:] = 0
    mask[0, 2, :, 9:] = 0
    return mask


def changed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, of_vision: Any, whole: Any) -> Made:
    vlm = VLMS[name]
    other = dataclasses.replace(vlm, vision=vlm.vision | of_vision, whole=vlm.whole | whole)
    monkeypatch.setitem(VLMS, name, other)
    model = make_vlm(name, folder)
    files = resolve(str(folder))
    return Made(model, files, ImageProcessor.load(files))


@pytest.mark.parametrize(
    ("name", "of_vision", "whole", "inputs"),
    [
        *(("qwen2_vl", {}, {}, patches(grid, 1176)) for grid in GRIDS),
        *(("qwen2_5_vl", {}, {}, patches(grid, 1176)) for grid in GRIDS),
        ("qwen2_5_vl", {"window_size": 112, "num_heads": 4}, {}, patches((1, 10, 18), 1176)),
        *(("qwen3_vl", {"deepstack_visual_indexes": [1]}, {}, patches(grid, 1536)) for grid in GRIDS),
        *(("glm4v", {"attention_bias": True}, {}, patches(grid, 1176)) for grid in GRIDS[:3]),
        ("gemma3", {"vision_use_head": True}, {"mm_tokens_per_image": 4}, images(1, 3, 64, 64)),
        ("gemma3", {"image_size": 60}, {"mm_tokens_per_image": 9}, images(1, 3, 60, 60)),
        ("llava", {}, {"vision_feature_layer": [0, -2, 2]}, images(2, 3, 32, 32)),
        ("llava", {}, {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, images(1, 3, 32, 32)),
        ("llava", {}, {"multimodal_projector_bias": False, "projector_hidden_act": "silu"}, images(1, 3, 32, 32)),
        (
            "llava",
            {"model_type": "siglip_vision_model"},
            {"vision_feature_select_strategy": "full"},
            images(2, 3, 32, 32),
        ),
        ("pixtral", {"num_attention_heads": 4, "head_dim": 8}, {}, images(1, 3, 48, 64, image_sizes=[[40, 56]])),
        ("pixtral", {}, {"vision_feature_layer": [1, 2]}, images(1, 3, 48, 64)),
        ("mistral3", {}, {"spatial_merge_size": 3}, images(1, 3, 48, 72, image_sizes=[[48, 72]])),
        ("idefics3", {}, {}, images(1, 3, 3, 32, 32, pixel_attention_mask=padded())),
        ("smolvlm", {"image_size": 104}, {"scale_factor": 4}, images(1, 2, 3, 96, 96)),
        ("internvl", {"use_qk_norm": True, "attention_bias": True, "norm_type": "rms_norm"}, {}, images(2, 3, 32, 32)),
        ("internvl", {"use_mean_pooling": False}, {}, images(1, 3, 32, 32)),
        ("internvl", {}, {"vision_feature_layer": 1, "downsample_ratio": 0.25}, images(1, 3, 32, 32)),
        ("llava_next", {}, {}, images(1, 5, 3, 32, 32, image_sizes=[[50, 47]])),
        ("llava_next", {}, {}, images(1, 3, 3, 32, 32, image_sizes=[[97, 31]])),
        (
            "llava_onevision",
            {},
            {"vision_aspect_ratio": "anyres_max_2"},
            images(1, 5, 3, 32, 32, image_sizes=[[90, 83]]),
        ),
    ],
)
def test_other_configs(
    name: str, of_vision: Any, whole: Any, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same families, and images that processors would not make of them."""
    one = changed(name, tmp_path, monkeypatch, of_vision, whole)
    tower = one.tower(one.files.folder)
    assert isinstance(tower, Vit)
    seen = tower.encode(inputs)
    theirs = one.features({key: torch.from_numpy(value) for key, value in inputs.items()})
    expected = joined(theirs.pooler_output)
    assert expected.std() > 0.05
    torch.testing.assert_close(seen.embeddings, expected, atol=1e-5, rtol=1e-5)
    for got, deep in zip(seen.deepstack, getattr(theirs, "deepstack_features", []), strict=True):
        torch.testing.assert_close(got, joined(deep), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "of_vision", "whole"),
    [
        ("qwen3_vl", {"hidden_act": "gelu_new"}, {}),
        ("llava", {}, {"projector_hidden_act": "relu"}),
        ("internvl", {"use_absolute_position_embeddings": False}, {}),
    ],
)
def test_configs_left_to_transformers(
    name: str,
    of_vision: Any,
    whole: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Which is said once."""
    one = changed(name, tmp_path, monkeypatch, of_vision, whole)
    tower = one.tower(one.files.folder)
    assert isinstance(tower, TransformersTower)
    image = one.processor.process(picture(5, 96, 64))
    assert len(tower.encode(image.inputs).embeddings) == image.num_tokens
    with caplog.at_level(logging.INFO):
        engine_for(tmp_path)
    [told] = [record.message for record in caplog.records if "by transformers' code" in record.message]
    assert one.config["architectures"][0] in told


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("qwen2_vl", r"^visual\.", "model.visual."),
        ("qwen2_5_vl", r"^visual\.", "model.visual."),
        ("gemma3", r"^vision_tower\.", "vision_tower.vision_model."),
        ("gemma3", r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
        ("llava", r"^vision_tower\.", "vision_tower.vision_model."),
        ("llava_next", r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
        ("llava_onevision", r"^vision_tower\.", "vision_tower.vision_model."),
    ],
)
@pytest.mark.usefixtures("code")
def test_names_of_other_times(made: Callable[[str], Made], name: str, old: str, new: str, tmp_path: Path) -> None:
    """In which published checkpoints are; some hold beside it what towers have no use for."""
    one = made(name)
    stored = load_file(one.files.folder / "model.safetensors")
    renamed = {re.sub(old, new, key): value for key, value in stored.items()}
    assert renamed.keys() != stored.keys()
    if name.startswith("llava"):
        renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        renamed["vision_tower.vision_model.head.probe"] = torch.ones(1, 1, 32)
    save_file(renamed, tmp_path / "model.safetensors")
    image = one.processor.process(picture(6, 70, 70))
    expected = one.tower(one.files.folder).encode(image.inputs).embeddings
    assert one.tower(tmp_path).encode(image.inputs).embeddings.equal(expected)


@pytest.mark.usefixtures("code")
def test_several_files(made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made("qwen3_vl")
    one.whole.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    image = one.processor.process(picture(7, 70, 70))
    expected = one.tower(one.files.folder).encode(image.inputs).embeddings
    assert one.tower(tmp_path).encode(image.inputs).embeddings.equal(expected)


def _lacking(key: str, stored: dict[str, Tensor]) -> None:
    del stored[key]


def _cut(key: str, stored: dict[str, Tensor]) -> None:
    stored[key] = stored[key][:-1].clone()


def _quantized(dtype: torch.dtype, key: str, stored: dict[str, Tensor]) -> None:
    stored[key] = stored[key].to(dtype)


def _packed(key: str, stored: dict[str, Tensor]) -> None:
    stored[key.removesuffix("weight") + "qweight"] = stored.pop(key).to(torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_packed, "int32: the vision tower of this checkpoint is quantized"),
        (_lacking, r"has no tensor model\.visual\.blocks\.1\.attn\.qkv\.weight"),
        (_cut, r"model\.visual\.blocks\.1\.attn\.qkv\.weight has shape \[95, 32\], the config asks for \[96, 32\]"),
        (partial(_quantized, torch.float8_e4m3fn), "float8_e4m3fn: the vision tower of this checkpoint is quantized"),
        (partial(_quantized, torch.int8), "int8: the vision tower of this checkpoint is quantized"),
        (partial(_quantized, torch.int32), "int32: the vision tower of this checkpoint is quantized"),
    ],
)
@pytest.mark.usefixtures("code")
def test_broken_towers(
    made: Callable[[str], Made], change: Callable[[str, dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    one = made("qwen3_vl")
    stored = load_file(one.files.folder / "model.safetensors")
    change("model.visual.blocks.1.attn.qkv.weight", stored)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        one.tower(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "unheard_of"}, "model_type 'unheard_of', which transformers does not know"),
        ({"model_type": ["qwen3_vl"]}, "which transformers does not know"),
        ({"model_type": "llama"}, "no model of images and text for model_type 'llama'"),
        ({"vision_config": {"depth": "many"}}, "not one of qwen3_vl in transformers"),
    ],
)
def test_strange_configs(made: Callable[[str], Made], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        vision_tower(made("qwen3_vl").config | change, None, torch.float32, torch.device("meta"))


def test_patches_without_a_size(made: Callable[[str], Made]) -> None:
    config = made("llava").config
    config["vision_config"]["patch_size"] = 0
    with pytest.raises(ModelError, match=r"no vision tower of vision_config \(ZeroDivisionError.*; correct it"):
        vision_tower(config, None, torch.float32, torch.device("meta"))


class _Bytes(TorchDispatchMode):
    """Of tensors that are made meanwhile, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {self._note(tensor, count=False) for tensor in args if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self._note(tensor, count=True)
        return result

    def _note(self, tensor: Tensor, *, count: bool) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if count and key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        return key

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VLMS)
@pytest.mark.usefixtures("code")
def test_what_encoding_takes(made: Callable[[str], Made], name: str, dtype: torch.dtype) -> None:
    one = made(name)
    tower = one.tower(one.files.folder, dtype)
    image = one.processor.process(picture(8, 180, 150))
    with _Bytes() as counted:
        tower.encode(image.inputs)
    held = sum(value.nbytes for value in image.inputs.values())  # which devices have a copy of
    assert counted.most <= tower.activation_bytes(image.num_tokens) <= 5 * (counted.most + held)


def test_pixels_that_are_no_image_of_the_model(made: Callable[[str], Made]) -> None:
    qwen, llava = (made(name).tower(None) for name in ("qwen2_vl", "llava"))
    with pytest.raises(ValueError, match="an image of 1 x 4 x 4 patches has 8"):
        qwen.encode(patches((1, 4, 4), 1176) | {"pixel_values": np.zeros((8, 1176), np.float32)})
    with pytest.raises(ValueError, match="an image of 5 x 4 patches, where the tower sees 4 each way"):
        llava.encode(images(1, 3, 40, 32))


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "mistral3", "smolvlm", "internvl"])
def test_processors_saved_in_one_file(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    """As transformers saves them now."""
    one = made(name)
    one.transformers_s.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    (tmp_path / "config.json").write_text(json.dumps(one.config))
    again = ImageProcessor.load(resolve(str(tmp_path)))
    assert type(again._processor).__name__ == type(one.transformers_s).__name__
    for image in pictures():
        same(again.process(image), one.processor.process(image))


def test_a_processor_without_a_name(made: Callable[[str], Made], tmp_path: Path) -> None:
    """Is the family's."""
    one = made("qwen3_5")
    for file in one.files.folder.glob("*.json*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "preprocessor_config.json"
    told = json.loads(path.read_text())
    del told["processor_class"]
    path.write_text(json.dumps(told))
    again = ImageProcessor.load(resolve(str(tmp_path)))
    same(again.process(picture(9, 90, 70)), one.processor.process(picture(9, 90, 70)))


def same(got: ProcessedImage, expected: ProcessedImage) -> None:
    assert (got.replacement, got.num_tokens) == (expected.replacement, expected.num_tokens)
    assert (got.rows, got.columns) == (expected.rows, expected.columns)
    assert got.inputs.keys() == expected.inputs.keys()
    for name, value in got.inputs.items():
        assert value.dtype == expected.inputs[name].dtype
        assert (value == expected.inputs[name]).all()


@pytest.mark.parametrize("name", VLMS)
def test_any_number_of_threads(made: Callable[[str], Made], name: str) -> None:
    one = made(name)
    images = pictures(5) * 4
    alone = [one.processor.process(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        for got, expected in zip(pool.map(one.processor.process, images), alone, strict=True):
            same(got, expected)


@pytest.mark.parametrize("name", VLMS)
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "CMYK"])
def test_pictures_of_every_kind(made: Callable[[str], Made], name: str, mode: str) -> None:
    image = made(name).processor.process(picture(10, 70, 50).convert("RGB").convert(mode))
    assert image.num_tokens > 0


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_a_picture_too_narrow(made: Callable[[str], Made], name: str) -> None:
    with pytest.raises(InvalidParameter, match=r"an image of 1000 x 4 pixels cannot be shown to this model: .*ratio"):
        made(name).processor.process(picture(11, 1000, 4))


def test_checkpoints_without_a_processor(made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made("qwen2_vl")
    (tmp_path / "config.json").write_text(json.dumps(one.config))
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json.*download it again"):
        ImageProcessor.load(resolve(str(tmp_path)))
    with pytest.raises(ModelError, match="is a GGUF file, which has no image processor"):
        ImageProcessor.load(ModelFiles("tiny", tmp_path, tmp_path / "tiny.gguf"))
    path = tmp_path / "preprocessor_config.json"
    path.write_text("[]")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json is not a JSON object"):
        ImageProcessor.load(resolve(str(tmp_path)))
    path.write_text(json.dumps(VLMS["qwen2_vl"].files["preprocessor_config.json"] | {"size": "large"}))
    with pytest.raises(ModelError, match=r"the image processor of .* cannot be loaded"):
        ImageProcessor.load(resolve(str(tmp_path)))


@pytest.mark.parametrize("token", [-1, 100_000, "five", None])
def test_an_image_token_that_is_none(made: Callable[[str], Made], token: Any, tmp_path: Path) -> None:
    one = made("qwen2_vl")
    for file in one.files.folder.glob("*.json*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(one.config | {"image_token_id": token}))
    with pytest.raises(ModelError, match=r"has image_token_id .*, which its tokenizer of 265 tokens lacks|cannot be"):
        ImageProcessor.load(resolve(str(tmp_path)))


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "llava"])
def test_an_image_token_that_is_another(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    """A token of the tokenizer, but none that the processor writes for an image."""
    one = made(name)
    for file in one.files.folder.glob("*.json*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    [field] = {"image_token_id", "image_token_index"} & one.config.keys()
    (tmp_path / "config.json").write_text(json.dumps(one.config | {field: 20}))
    with pytest.raises(ModelError, match=r"has image_token_id 20, which is .*; its processor does not write that"):
        ImageProcessor.load(resolve(str(tmp_path)))


def test_a_processor_that_lacks_what_it_counts_with(made: Callable[[str], Made], tmp_path: Path) -> None:
    """LLaVA's counts patches by what its processor_config.json says."""
    for file in made("llava").files.folder.glob("*.json*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ModelError, match=r"shows no picture .*; check its processor_config\.json"):
        ImageProcessor.load(resolve(str(tmp_path)))

"""Tiny models of images and text, each with a random checkpoint, processor files and a chat template as its family's
published ones, and pictures to show them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import TINY
from PIL import Image, ImageDraw
from vlm_families import NATIVE, Vlm
from vlm_others import OTHERS

SIZE = 352  # of the vocabulary: all bytes, and what the families add
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
VLMS = NATIVE | OTHERS


def make_vlm(name: str, folder: Path) -> Any:
    """The family's tiny model in fp32, saved into `folder` with its tokenizer and processor files."""
    import transformers

    vlm = VLMS[name]
    tokenizer = _tokenizer(vlm)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in vlm.tokens.items()}
    config = getattr(transformers, vlm.config)(
        text_config=TINY | {"vocab_size": SIZE} | _IDS | vlm.text, vision_config=vlm.vision, **(ids | vlm.whole)
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    _enliven(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file, content in vlm.files.items():
        (folder / file).write_text(json.dumps(content))
    return model


def _enliven(model: torch.nn.Module) -> None:
    """What starts at 0 or 1 must matter too, and a picture must be seen in the logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # Gemma 3's starts at 0
            torch.nn.init.normal_(parameter, 0.0, 0.25)
        is_norm = re.search(r"norm|\.ln_|layrnorm", name, re.IGNORECASE) is not None
        if is_norm or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if is_norm and name.endswith("weight") else 0.0, 0.2)


def _tokenizer(vlm: Vlm) -> Any:
    """All bytes, then what the family adds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", *vlm.tokens.values(), *vlm.named.values(), *vlm.added]
    special = list(dict.fromkeys(special))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: place for place, text in enumerate([*special, *letters])}
    assert len(vocabulary) <= SIZE
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=dict(vlm.named),
    )
    fast.chat_template = vlm.template
    return fast


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Shapes on a gradient, the same in every run."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    colours = [draw(0, 256) for _ in range(6)]
    ramp = Image.linear_gradient("L").resize((width, height))
    turned = Image.linear_gradient("L").rotate(90).resize((width, height))
    bands = [
        ramp.point(lambda v, a=a, b=b: a + (b - a) * v // 255) for a, b in zip(colours[:2], colours[2:4], strict=True)
    ]
    image = Image.merge("RGB", [*bands, turned])
    pen = ImageDraw.Draw(image)
    for _ in range(5):
        x, y = draw(0, width), draw(0, height)
        box = (x, y, x + draw(1, width), y + draw(1, height))
        shape: Callable[..., None] = (pen.rectangle, pen.ellipse)[draw(0, 2)]
        shape(box, fill=(draw(0, 256), draw(0, 256), draw(0, 256)))
    return image

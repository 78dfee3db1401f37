"""A picture as its model wants it: the text that stands for it in a prompt, and what the vision tower reads.

Both are made by transformers' processor of the family, one image at a time. Videos and sound are not served, so the
processor goes without what it has for them, and without torchvision: pictures are resized by Pillow.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.multimodal.classes import class_of, without_others
from quire_engine.weights.json_file import read_object
from quire_engine.weights.resolve import ModelFiles

if TYPE_CHECKING:
    from PIL.Image import Image

_OWN = ("processor_config.json", "preprocessor_config.json")
_INPUTS = (  # what vision towers read
    "pixel_values",
    "pixel_attention_mask",
    "image_sizes",
    "image_grid_thw",
    "image_merge_sizes",
)
_TRIED = 64  # pixels each way, of the picture that a processor is tried with
_loading = threading.Lock()


@dataclass(frozen=True, slots=True)
class ProcessedImage:
    """One image, ready for a prompt and for the vision tower."""

    replacement: str  # takes the placeholder's place in the rendered prompt
    inputs: dict[str, np.ndarray]
    num_tokens: int  # in the replacement, of those that are embeddings of the image
    rows: int  # of those tokens as a grid, where positions follow it (M-RoPE); else 0
    columns: int


class ImageProcessor:
    """One model's processor of images, for any number of threads."""

    def __init__(self, processor: Any, image_token_id: int) -> None:
        """`processor`: one of transformers. `image_token_id`: the token whose embeddings are the image's."""
        self._processor = processor
        self.placeholder: str = processor.image_token
        self.image_token_id = image_token_id
        self._embedded: str = processor.tokenizer.convert_ids_to_tokens(image_token_id)
        merged = processor._merge_kwargs(
            processor.valid_processor_kwargs,
            tokenizer_init_kwargs=processor.tokenizer.init_kwargs,
            images_kwargs={"return_tensors": "np"},
        )
        self._options: dict[str, Any] = merged["images_kwargs"]
        converts = self._options.get("do_convert_rgb", getattr(processor.image_processor, "do_convert_rgb", None))
        self._converts = bool(converts)

    @staticmethod
    def load(files: ModelFiles) -> "ImageProcessor":
        """The checkpoint's own. Raises ModelError."""
        if files.gguf_path is not None:
            raise ModelError(
                f"{files.name} is a GGUF file, which has no image processor; images need a checkpoint folder"
            )
        if not any((files.folder / name).is_file() for name in _OWN):
            raise ModelError(
                f"{files.name} has no preprocessor_config.json, so how its images are prepared is not known; download "
                "it again with all its *.json files"
            )
        raw = read_object(files.folder / "config.json")
        try:
            with _loading:
                processor = _made(files, raw)
        except ModelError:
            raise
        except ImportError as error:
            raise ModelError(
                f"the image processor of {files.name} needs what is not installed: {' '.join(str(error).split())[:300]}"
            ) from error
        except Exception as error:  # transformers raises nearly anything here
            raise ModelError(
                f"the image processor of {files.name} cannot be loaded ({type(error).__name__}: {str(error)[:300]}); "
                f"check its {' and '.join(_OWN)}, or take a newer release of transformers"
            ) from error
        token = image_token_of(raw)
        if token is None or not 0 <= token < len(processor.tokenizer):
            raise ModelError(
                f"config.json of {files.name} has image_token_id {token}, which its tokenizer of "
                f"{len(processor.tokenizer)} tokens lacks; correct it"
            )
        made = ImageProcessor(processor, token)
        made._try(files.name)
        return made

    def process(self, image: "Image") -> ProcessedImage:
        """Raises InvalidParameter for a picture that the model's processor refuses."""
        if not self._converts and image.mode != "RGB":
            image = image.convert("RGB")
        try:
            images = self._processor.prepare_inputs_layout(images=[image])[0]
            made, [replacement] = self._processor._process_images(images, **self._options)
        except MemoryError:
            raise
        except Exception as error:  # others' code, for which some picture is too narrow, say
            raise InvalidParameter(
                f"an image of {image.width} x {image.height} pixels cannot be shown to this model: {str(error)[:300]}; "
                "send another",
                "image",
            ) from error
        inputs = {name: np.asarray(made[name]) for name in _INPUTS if name in made}
        rows = columns = 0
        if "image_grid_thw" in inputs:
            side = self._processor.image_processor.merge_size
            rows, columns = (int(length) // side for length in inputs["image_grid_thw"][0, 1:])
        return ProcessedImage(replacement, inputs, replacement.count(self._embedded), rows, columns)

    def _try(self, name: str) -> None:
        """Shows the model `name` a picture: what does not fit together is told before a request comes. Raises
        ModelError."""
        from PIL import Image

        try:
            tried = self.process(Image.new("RGB", (_TRIED, _TRIED)))
        except InvalidParameter as error:
            raise ModelError(
                f"the image processor of {name} shows no picture ({error.__cause__}); check its {' and '.join(_OWN)}: "
                "download it again with all its *.json files"
            ) from error
        if not tried.num_tokens:
            raise ModelError(
                f"config.json of {name} has image_token_id {self.image_token_id}, which is {self._embedded!r}; its "
                "processor does not write that for an image: correct one of them"
            )


def image_token_of(raw: Mapping[str, Any]) -> int | None:
    """The token of a config in whose places the embeddings of images stand, as the model's own code finds it."""
    from transformers import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(f"config.json has model_type {kind!r:.80}, which transformers does not know")
    cls = CONFIG_MAPPING[kind]
    names = ["image_token_id", "image_token_index"]
    found = next((raw[name] for name in names if name in raw), None)
    if found is None:
        made = cls()
        found = next((getattr(made, name) for name in names if hasattr(made, name)), None)
    return found if type(found) is int else None


def _made(files: ModelFiles, raw: Mapping[str, Any]) -> Any:
    """The processor, with its image processor and its tokenizer."""
    from transformers import AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # where no torchvision is asked for

    folder, local = str(files.folder), {"local_files_only": True, "trust_remote_code": False}
    there = [name for name in (*_OWN, "tokenizer_config.json") if (files.folder / name).is_file()]
    kind = class_of([read_object(files.folder / name).get("processor_class") for name in there], raw)
    parts: dict[str, Callable[[], Any]] = {
        "image_processor": lambda: AutoImageProcessor.from_pretrained(folder, backend="pil", **local),
        "tokenizer": lambda: AutoTokenizer.from_pretrained(folder, **local),
    }
    wanted = kind.get_attributes()
    own, _ = kind.get_processor_dict(folder, local_files_only=True)
    told = {key: value for key, value in own.items() if key not in wanted}
    return without_others(kind).from_args_and_dict([parts[name]() if name in parts else None for name in wanted], told)

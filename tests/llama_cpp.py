"""Runs llama.cpp's own converter (convert_hf_to_gguf.py), which `make test` unpacks beside the virtual environment's
packages, with the vocabularies that llama.cpp is tested with:

python tests/llama_cpp.py FOLDER...    writes FOLDER/../FOLDER.gguf for each, unquantized, with letters for tokens
python tests/llama_cpp.py --unpack ARCHIVE    takes these out of llama-cpp-python's source archive
"""

import json
import logging
import sys
import tarfile
from pathlib import Path
from typing import Any

HOME = Path(sys.prefix) / "llama.cpp"
_NEEDED = ("conversion", "gguf-py", "models")


def unpack(archive: Path) -> None:
    """What is needed of llama.cpp, into HOME."""
    with tarfile.open(archive) as packed:
        for member in packed:
            _, inside, path = member.name.partition("/vendor/llama.cpp/")
            if inside and path.split("/")[0] in _NEEDED and member.isfile():
                member.name = path
                packed.extract(member, HOME, filter="data")


def convert(folders: list[Path], split: int = 0) -> None:
    """Writes the files; `split`: the most tensors of one."""
    sys.path[:0] = [str(HOME), str(HOME / "gguf-py")]
    import conversion
    import gguf
    import torch
    from conversion.base import ModelBase, ModelType, get_model_architecture
    from tokenizers.pre_tokenizers import ByteLevel

    logging.disable(logging.WARNING)
    load = ModelBase.load_hparams

    def with_older_fields(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        """Published configs have fields that transformers has renamed since; the converter asks for those."""
        return {**load(folder, is_mistral_format), **json.loads((folder / "config.json").read_text())}

    def letters(model: Any) -> None:
        """In place of each family's tokenizer, which tiny models lack: bytes, and some with a space before them."""
        size = model.hparams["vocab_size"]
        alphabet = sorted(ByteLevel.alphabet())
        pairs = [("Ġ", letter) for letter in alphabet][: size - 3 - len(alphabet)]
        tokens = ["<unk>", "<s>", "</s>", *alphabet, *map("".join, pairs)]
        assert len(tokens) == size
        model.gguf_writer.add_tokenizer_model("gpt2")
        model.gguf_writer.add_tokenizer_pre("gpt-2")
        model.gguf_writer.add_token_list(tokens)
        model.gguf_writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (size - 3))
        model.gguf_writer.add_token_merges(list(map(" ".join, pairs)))
        model.gguf_writer.add_bos_token_id(1)
        model.gguf_writer.add_eos_token_id(2)

    ModelBase.load_hparams = staticmethod(with_older_fields)
    for folder in folders:
        config = ModelBase.load_hparams(folder, False)
        kind = conversion.get_model_class(get_model_architecture(config, ModelType.TEXT))
        changes = {"set_vocab": letters, "model_arch": kind.model_arch}
        if not config.get("num_nextn_predict_layers"):
            changes["no_mtp"] = True  # the config may not say so where the checkpoint has layers that predict further
        converter = type(kind.__name__, (kind,), changes)
        out = folder.with_suffix(".gguf")
        with torch.inference_mode():
            converter(folder, gguf.LlamaFileType.ALL_F32, out, split_max_tensors=split).write()


if __name__ == "__main__":
    if sys.argv[1] == "--unpack":
        unpack(Path(sys.argv[2]))
    elif sys.argv[1] == "--split":
        convert([Path(sys.argv[3])], int(sys.argv[2]))
    else:
        convert([Path(name) for name in sys.argv[1:]])

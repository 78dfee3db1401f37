"""libFuzzer over what reads files: `python fuzz_files.py {gguf,safetensors} CORPUS -runs=N …` ends with a status other
than 0 at the first input that raises anything but ModelError, hangs or takes too much memory."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["quire_engine.weights", "quire_engine.text.gguf"]):
    from quire_engine.errors import ModelError
    from quire_engine.text.gguf.build import build
    from quire_engine.weights.gguf.checkpoint import GGUFCheckpoint
    from quire_engine.weights.gguf.families import config_of
    from quire_engine.weights.gguf.file import GGUFFile
    from quire_engine.weights.gguf.vocabulary import Vocabulary
    from quire_engine.weights.tensors import Checkpoint, SafetensorsCheckpoint


def read_all(checkpoint: Checkpoint) -> None:
    for name in checkpoint.names():
        checkpoint.tensor(name).read()


def gguf(path: Path) -> None:
    file = GGUFFile(path)
    config_of(file)
    read_all(GGUFCheckpoint(file))
    vocabulary = Vocabulary(path, file.metadata)
    assert all(end < len(vocabulary.tokens) for end in vocabulary.ends)
    fast = build(vocabulary).backend_tokenizer
    fast.decode(fast.encode("ab a\n").ids)


def safetensors(path: Path) -> None:
    read_all(SafetensorsCheckpoint(path.parent))


def main() -> None:
    reader: Callable[[Path], None] = {"gguf": gguf, "safetensors": safetensors}[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model.{sys.argv[1]}"

        def one(data: bytes) -> None:
            path.write_bytes(data)
            try:
                reader(path)
            except ModelError as error:
                assert len(str(error)) < 1000

        atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Whatever bytes a file holds, it is read or refused with ModelError: no crash, no hang, no gigabytes."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("atheris", reason="it has no package for this machine")
pytestmark = pytest.mark.slow


def write_gguf(folder: Path) -> None:
    """A tiny Llama in every quantization that is read whole, and its tokenizer."""
    writer = gguf.GGUFWriter(folder / "seed.gguf", "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv([2])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", b"\xe2\x96\x81a", b"b", b"<0x0A>"])
    writer.add_token_scores([0.0, 0.0, 0.0, -1.0, -2.0, 0.0])
    writer.add_token_types([2, 3, 3, 1, 1, 6])
    values = np.linspace(-1, 1, 32 * 6, dtype=np.float32).reshape(6, 32)
    writer.add_tensor("token_embd.weight", values)
    writer.add_tensor("output_norm.weight", values[0])
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down"):
        square = np.linspace(-1, 1, 1024, dtype=np.float32).reshape(32, 32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"blk.0.{name}.weight", gguf.quantize(square, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_safetensors(folder: Path) -> None:
    save_file({"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.int8)}, folder / "seed")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_any_bytes_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    {"gguf": write_gguf, "safetensors": write_safetensors}[kind](corpus)
    limits = ["-runs=30000", "-max_total_time=300", "-timeout=20", "-rss_limit_mb=3000", "-max_len=16384", "-seed=1"]
    command = [sys.executable, str(Path(__file__).with_name("fuzz_files.py")), kind, str(corpus), *limits]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

"""Every Triton kernel compiles for NVIDIA and AMD, without a GPU, within the chip's shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_ahead_of_time(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("compile_ahead.py"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {entry["target"] for entry in compiled} == {"sm_80", "sm_90", "gfx942"}
    assert len(compiled) == 12
    for entry in compiled:
        assert entry["bytes"] > 1000
        assert entry["within"], entry

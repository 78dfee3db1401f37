"""The table of kernels per layer is the current one, and a dense layer launches no more than it must."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "engine" / "kernel_count.py"


def test_kernels_per_layer() -> None:
    """In a process of its own: here kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip() == SCRIPT.with_name("kernels.md").read_text().strip(), "run make kernel-table"
    rows = [row.split(" | ") for row in ran.stdout.splitlines() if "| bf16 |" in row]
    assert len(rows) == 3
    for row in rows[:2]:
        assert row[2].split()[0] == row[3], "a kernel more than the fewest"

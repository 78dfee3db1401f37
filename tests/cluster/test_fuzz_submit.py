"""Whatever a gateway sends, an engine refuses or computes it, and what runs beside it has the same tokens as alone."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="it has no package for this machine")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_message_is_refused_or_computed(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    script = Path(__file__).with_name("fuzz_submit.py")
    limits = ["-runs=4000", "-max_total_time=300", "-timeout=60", "-rss_limit_mb=4000", "-max_len=300", "-seed=1"]
    command = [sys.executable, str(script), str(checkpoint("qwen3")), *limits]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

"""No number of tokens or rows makes serving compile what a few warm-up sizes have not."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_day_compiles_nothing_after_warm_up() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_keys.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {operation["target"] for operation in found} == {"sm_90", "gfx942"}
    assert all(operation["warmed"] for operation in found)
    assert not [operation for operation in found if operation["late"]]

"""`make gpu-check` without a GPU: every stage at toy sizes, and what it makes of kernels that are wrong or worse."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATHS = [str(path) for path in (*ROOT.glob("benchmarks/*"), ROOT / "tests" / "kernels") if path.is_dir()]
Finding = dict[str, Any]


def rehearse(out: Path, *arguments: str) -> tuple[int, list[Finding], str]:
    """Its exit status, what it kept and what it printed."""
    paths = os.pathsep.join([*PATHS, str(ROOT / "engine"), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "OUT": str(out)}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "check.py"), "--rehearse", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (out / "gpu-check.jsonl").exists(), ran.stderr[-3000:]
    findings = [json.loads(line) for line in (out / "gpu-check.jsonl").read_text().splitlines()]
    return ran.returncode, findings, ran.stdout


def test_engine_stages(tmp_path: Path) -> None:
    status, findings, printed = rehearse(tmp_path, "a", "b", "d")
    assert status == 0, printed
    at = {(finding["stage"], finding["what"]): finding for finding in findings}
    assert len(at) == len(findings) == len(printed.splitlines()) - 1
    speeds = {"one prompt of 16": {"first_token_ms"}, "memory": {"planned_gib"}, "start": {"weights_s", "capture_s"}}
    for requests in (1, 2):
        speeds[f"{requests} requests"] = {"tokens_per_s", "prefill_tokens_per_s", "step_ms", "host_ms", "of_floor"}
    expected = {("-", "machine"): {"card", "driver", "torch", "triton", "transformers"}, ("-", "rates"): {"bytes"}}
    for dtype in ("float32", "bfloat16"):
        for way in ("kernel by kernel", "overlapped"):
            for shape in ("tiny dense", "tiny images"):
                expected["a", f"{shape}, torch, {dtype}, {way}"] = {"same_tokens"}
    for stage, model in (("b", "tiny dense"), ("d", "tiny latent"), ("d", "tiny MXFP4")):
        expected |= {(stage, f"{model}, {what}"): figures for what, figures in speeds.items()}
    expected |= {
        ("b", f"tiny dense, again, {what}"): figures for what, figures in speeds.items() if what != "2 requests"
    }
    expected["b", "tiny dense, vLLM"] = {"why"}
    assert set(at) == set(expected)
    for key, figures in expected.items():
        assert figures <= set(at[key]), key
        assert at[key]["right"] is (True if key[0] == "a" else None)
        assert all(value > 0 for name, value in at[key].items() if name in figures and name.endswith(("_s", "_ms"))
                   and name != "capture_s"), at[key]  # fmt: skip


def test_kernels_that_are_wrong_or_worse(tmp_path: Path) -> None:
    """None is called right, and none keeps the others from being tried."""
    status, findings, printed = rehearse(tmp_path, "c", "--cases", "cases_rehearsed", "cases_wrong")
    assert status == 1
    right = {finding["what"]: finding["right"] for finding in findings if finding["stage"] == "c"}
    assert right == {
        "a product": True,
        "a product, not timed": True,
        "a right product": True,
        "a wrong product": False,
        "a kernel that fails": False,
        "a kernel that ends its process": False,
        "the product after it": True,
    }
    why = {finding["what"]: finding.get("why", "") for finding in findings}
    assert "Mismatched elements: 1 / 165" in why["a wrong product"]
    assert "no such kernel" in why["a kernel that fails"]
    assert "status 3" in why["a kernel that ends its process"]
    timed = next(finding for finding in findings if finding["what"] == "a right product")
    assert {"microseconds", "of_floor", "bandwidth", "matrix"} <= set(timed)
    assert timed["peers"]["it"] > 0
    assert "WRONG a wrong product" in printed


def test_what_hangs_is_ended_and_what_it_had_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    from findings import Findings, Stage

    script = tmp_path / "hangs.py"
    script.write_text(  # what its libraries say is no finding
        'import time\nprint(\'{"what": "one", "right": true}\', flush=True)\n'
        "for _ in range(500):\n    time.sleep(0.2)\n    print('still compiling', flush=True)\n"
    )
    stage = Stage(Findings("x", tmp_path / "found.jsonl"), 60)
    begun = time.monotonic()
    ran = stage.run(str(script), 60, silence=3)
    assert [finding["what"] for finding in ran.found] == ["one"]
    assert "found nothing for 3 s" in ran.why
    stage.measure("two", str(script), 3)
    assert time.monotonic() - begun < 50
    kept = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(finding["what"], finding["right"]) for finding in kept] == [("one", True), ("one", True), ("two", False)]
    over = Stage(Findings("y", tmp_path / "found.jsonl"), 0.0)
    assert "time is over" in over.run(str(script), 60).why

"""Findings, told and kept as they come, and the processes that make them.

A measure is a script beside this file: `measure.py '{"options": ...}'`. It writes its findings to its standard output,
one JSON object a line: `what` was looked at, whether it is `right` (null: there is no right or wrong to it), `why` not,
and figures.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_FINDING = '{"what"'  # what a line of one begins with


def tell(what: str, right: bool | None, why: str = "", **figures: Any) -> None:
    """A finding of this process."""
    print(json.dumps({"what": what, "right": right} | ({"why": why} if why else {}) | figures), flush=True)


class Findings:
    """Of a stage. Each is printed and appended to a file at once, so that a cut loses none. Threads may add."""

    def __init__(self, stage: str, file: Path) -> None:
        self.wrong = 0
        self._stage, self._file, self._lock = stage, file, threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, finding: dict[str, Any]) -> None:
        """See the module."""
        finding = {"stage": self._stage, "date": datetime.now(UTC).isoformat(timespec="seconds")} | finding
        mark = {True: "right", False: "WRONG", None: "     "}[finding["right"]]
        shown = [f"{name} {_short(value)}" for name, value in list(finding.items())[4:] if name != "why"]
        if finding.get("why"):
            shown.append(finding["why"].strip().splitlines()[-1][:160])
        with self._lock:
            self.wrong += finding["right"] is False
            with self._file.open("a") as file:
                file.write(json.dumps(finding) + "\n")
            print(f"{self._stage} {mark} {finding['what']}: {', '.join(shown)}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass
class Ran:
    """A process that has ended: what it found, and why it did not end well ("": it did)."""

    found: list[dict[str, Any]] = field(default_factory=list)
    why: str = ""


class Stage:
    """Runs measures, none beyond the time that the stage has."""

    def __init__(self, findings: Findings, seconds: float) -> None:
        self.findings = findings
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def measure(self, what: str, script: str, seconds: float, **options: Any) -> list[dict[str, Any]]:
        """What the script found. That it failed is a finding too."""
        ran = self.run(script, seconds, **options)
        if ran.why:
            self.findings.add({"what": what, "right": False, "why": ran.why})
        return ran.found

    def run(self, script: str, seconds: float, *, silence: float | None = None, **options: Any) -> Ran:
        """In a process of its own, ended after so many seconds, or when it has found nothing for `silence` of them."""
        ran = Ran()
        if self.left < 1:
            ran.why = "left out: the stage's time is over"
            return ran
        end = min(time.monotonic() + seconds, self._end)
        command = [sys.executable, str(Path(__file__).parent / script), json.dumps(options)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
            try:
                for line in _lines(process, end, silence):
                    ran.found.append(json.loads(line))
                    self.findings.add(ran.found[-1])
                if process.wait(timeout=30):
                    ran.why = f"ended with status {process.returncode}"
            except (TimeoutError, subprocess.TimeoutExpired) as error:
                ran.why = str(error)
            finally:  # with all that it has started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if ran.why:
                errors.seek(0)
                ran.why = f"{errors.read()[-3000:]}\n{ran.why}"
        if ran.why:
            last = [line for line in ran.why.splitlines() if line.strip()][-2:]
            ran.why += f": {last[0][:200]}" if len(last) == 2 else ""
        return ran


def _lines(process: subprocess.Popen[str], end: float, silence: float | None) -> Iterator[str]:
    """Its findings, as they come; other lines are what libraries say. Raises TimeoutError."""
    assert process.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    output = process.stdout

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    heard = time.monotonic()
    while True:
        now = time.monotonic()
        if now > end:
            raise TimeoutError("ended from without: it took longer than it may")
        if silence is not None and now > heard + silence:
            raise TimeoutError(f"ended from without: it found nothing for {silence:.0f} s")
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            if process.poll() is not None:  # what it has started may hold its output open
                return
            continue
        if line is None:
            return
        if line.startswith(_FINDING):
            heard = time.monotonic()
            yield line

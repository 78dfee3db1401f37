"""Builds kernels.c with the machine's C compiler (Triton needs one at run time too), once per machine and source."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from quire_kernels.cache_folder import cache_folder

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = [
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-ffast-math",
    "-fno-finite-math-only",
    "-fopenmp",
    "-fPIC",
    "--param=avoid-fma-max-bits=0",  # else copies of a loop differ in bits on Zen: GCC keeps some a * b + c apart
    "-std=gnu11",
]


class NativeBuildError(Exception):
    """The C kernels cannot be built here; the message says why and what to install."""


def _cpu_identity() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _compile(compiler: str, target: Path) -> None:
    """Two steps, so that the library names no OpenMP runtime of its own: torch's is already in the process."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        object_file, library = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
        for command in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(object_file)],
            [compiler, "-shared", str(object_file), "-o", str(library), "-lm"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NativeBuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        os.replace(library, target)


def load() -> ctypes.CDLL:
    """The library of C kernels, built if this machine has not built this source yet (under 2 s).

    Raises NativeBuildError without a working C compiler, or a folder to keep it in. torch must have been imported: its
    OpenMP runtime is used.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NativeBuildError("no C compiler found; install one (gcc or clang), or set CC to its path")
    digest = hashlib.sha256(SOURCE.read_bytes())
    digest.update(" ".join([compiler, *FLAGS, platform.machine(), _cpu_identity()]).encode())
    try:
        library = cache_folder() / "native" / f"{digest.hexdigest()[:24]}.so"
        if not library.exists():
            _compile(compiler, library)
    except (OSError, RuntimeError) as error:  # the second: this user has no home
        raise NativeBuildError(f"its file cannot be kept ({error}); set QUIRE_CACHE to a folder for it") from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeBuildError(f"the built kernels do not load: {error}") from error

"""Loads a checkpoint and prints the private memory that this took at most, and takes afterwards, in bytes.

A program of its own: what a process has freed before would hide what it takes. Mapped files are not private memory.
"""

import ctypes
import sys
import threading
import time

from quire_engine.config import EngineConfig
from quire_engine.execution.runner import ModelRunner
from quire_engine.weights.resolve import find_model


def private() -> int:
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def load(folder: str) -> ModelRunner:
    config = EngineConfig(model=folder, device="cpu", kv_cache_memory_bytes=32 << 20, max_model_len=256)
    return ModelRunner(config, find_model(config))


def main(warm: str, folder: str) -> None:
    load(warm)  # what the first model of a process takes besides
    libc = ctypes.CDLL("libc.so.6")
    for option in (-1, -3):  # malloc as a process finds it: the first model has told it to keep what is freed
        libc.mallopt(option, 128 << 10)
    libc.malloc_trim(0)
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, private())
            time.sleep(0.002)

    before = private()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(folder)
    done.set()
    watcher.join()
    print(most - before, private() - before, model.limits.num_pages)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

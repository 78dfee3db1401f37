"""What glibc's malloc is told about this process's memory. Other allocators decide for themselves."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD = (
    4 << 20
)  # larger (a full batch's logits) is mapped afresh: kept, its many sizes would fragment the heap


def _glibc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def return_freed_memory() -> None:
    """Gives what start-up has freed back to the system: files parsed, weights before they were packed."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Keeps what is freed from now on: a fresh mapping per activation costs more in page faults than the arithmetic."""
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)

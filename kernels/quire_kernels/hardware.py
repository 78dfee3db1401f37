"""What the launchers must know of a chip to pick tile shapes. Decided by explicit tables, never by trial runs."""

import functools
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Hardware:
    """One chip. `shared_bytes` is what one program may use of the shared memory (the LDS on AMD)."""

    target: str  # "sm_90", "gfx942", ... or "interpreter"
    multiprocessors: int
    shared_bytes: int
    fp8: torch.dtype | None  # what its matrix units read as e4m3; None: none

    @property
    def amd(self) -> bool:
        """Whether a warp has 64 lanes and matrices are multiplied by mfma."""
        return self.target.startswith("gfx")

    @property
    def warpgroup_matrices(self) -> bool:
        """Whether tiles of at least 64 rows get wgmma or tcgen05."""
        return self.target in ("sm_90", "sm_100", "sm_103")


_KIB = 1 << 10
CHIPS = {
    chip.target: chip
    for chip in (
        Hardware("sm_80", 108, 163 * _KIB, None),
        Hardware("sm_86", 84, 99 * _KIB, None),
        Hardware("sm_89", 142, 99 * _KIB, torch.float8_e4m3fn),
        Hardware("sm_90", 132, 227 * _KIB, torch.float8_e4m3fn),
        Hardware("sm_100", 148, 227 * _KIB, torch.float8_e4m3fn),
        Hardware("sm_103", 148, 227 * _KIB, torch.float8_e4m3fn),
        Hardware("sm_120", 170, 99 * _KIB, torch.float8_e4m3fn),
        Hardware("gfx90a", 104, 64 * _KIB, None),
        Hardware("gfx942", 304, 64 * _KIB, torch.float8_e4m3fnuz),
        Hardware("gfx950", 256, 160 * _KIB, torch.float8_e4m3fn),
        Hardware("interpreter", 4, 227 * _KIB, torch.float8_e4m3fn),
    )
}
_stand_in: list[Hardware] = []  # the chip that meta tensors stand for: see stands_for


@functools.cache
def _of_gpu(index: int) -> Hardware:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        target = properties.gcnArchName.split(":")[0]
    else:
        target = f"sm_{properties.major}{properties.minor}"
    known = CHIPS.get(target)
    if known is None:
        raise ValueError(f"the kernels have no tile shapes for {target}; known: {', '.join(CHIPS)}")
    return Hardware(target, properties.multi_processor_count, known.shared_bytes, known.fp8)


def hardware(device: torch.device) -> Hardware:
    """The chip of a device; on a CPU the interpreter, on "meta" what `stands_for` named."""
    if device.type == "cuda":
        return _of_gpu(device.index if device.index is not None else torch.cuda.current_device())
    if device.type == "meta":
        return _stand_in[-1]
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("the Triton kernels need a GPU; on a CPU use the native or torch backend")
    return CHIPS["interpreter"]


class stands_for:
    """Within, meta tensors stand for tensors on `chip`: how kernels are compiled for a chip that is not here."""

    def __init__(self, chip: Hardware) -> None:
        self._chip = chip

    def __enter__(self) -> None:
        _stand_in.append(self._chip)

    def __exit__(self, *_: object) -> None:
        _stand_in.pop()

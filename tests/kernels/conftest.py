"""Kernel tests run on Triton's interpreter, mended first."""

import interpreter_shim

interpreter_shim.install()

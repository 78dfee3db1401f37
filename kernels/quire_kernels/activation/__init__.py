"""Activations of feed-forward layers, gated or not, and plain fp8 quantization as the one that changes nothing.

Contract: gated, x [T, 2N] holds gate and up, and the result [T, N] is f(gate) * up; else x [T, N] gives f(x) [T, N].
Computed in fp32, rounded once; with a `QuantizedOutput` the result is Quantized.
"""

from enum import IntEnum


class Activation(IntEnum):
    """f."""

    IDENTITY = 0
    SILU = 1  # x * sigmoid(x): SwiGLU when gated (Shazeer 2020)
    GELU = 2  # x * Phi(x), by the error function
    GELU_TANH = 3  # its approximation with tanh
    RELU_SQUARED = 4  # max(x, 0)^2 (So et al. 2021)
    RELU = 6  # max(x, 0)
    SIGMOID = 7  # 1 / (1 + e^-x)
    SWIGLU_CLAMPED = 5  # gpt-oss, gated alone: gate <= 7, |up| <= 7; gate * sigmoid(1.702 gate) * (up + 1)


CLAMP, SHARPNESS = 7.0, 1.702  # of SWIGLU_CLAMPED

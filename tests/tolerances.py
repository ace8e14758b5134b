"""How far a result may be from its fp64 reference, per type, and why.

Errors are measured against the root mean square of the expected tensor, so that a sum that happens
to cancel to almost nothing is not asked for more digits than its terms had.
"""

from __future__ import annotations

import torch

#: (root mean square of the error, largest error), both over the expected root mean square.
TOLERANCES = {
    # Only the order of additions differs between one rank and several.
    torch.float64: (1e-13, 1e-12),
    # 24 bits of mantissa: 6e-8 a rounding, some hundred terms.
    torch.float32: (1e-6, 1e-5),
    # 8 bits of mantissa: 2e-3 a rounding, at the rank, at the output and in each gradient.
    torch.bfloat16: (1e-2, 1e-1),
}

#: The same for gradients that went through a whole model in float32: each of some dozen products
#: and norms, forward and backward, adds its rounding.
MODEL_GRADIENTS = (1e-5, 1e-4)

#: And in bfloat16: some dozen roundings of 2e-3 each, which softmax and norms magnify.
MODEL_BFLOAT16 = (8e-2, 4e-1)

#: Of attention: values are summed in float32 under weights that sum to one, so that it is the
#: rounding of the weights and of the output to the type that shows, and in float32 the exponentials
#: of logits whose own rounding they magnify.
ATTENTION = {
    torch.float32: (2e-6, 2e-5),
    # 11 bits of mantissa: 2.4e-4 a rounding.
    torch.float16: (1e-3, 1e-2),
    # 8 bits of mantissa: 2e-3 a rounding, and twice that in Triton's interpreter, which cuts off.
    torch.bfloat16: (1e-2, 1e-1),
}


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    what: str,
    tolerance: tuple[float, float] | None = None,
) -> None:
    """Compare whole tensors within a tolerance, by default that of ``actual``'s type."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    difference = (actual.double() - expected.double()).detach()
    size = expected.detach().double().square().mean().sqrt()
    assert size > 0, f"{what}: the expected tensor is zero and would prove nothing"
    rms, largest = difference.square().mean().sqrt() / size, difference.abs().max() / size
    wanted_rms, wanted_largest = tolerance or TOLERANCES[actual.dtype]
    # Written so that NaN fails.
    assert rms <= wanted_rms, f"{what}: rms error {rms:.2e} over {wanted_rms}"
    assert largest <= wanted_largest, f"{what}: largest error {largest:.2e} over {wanted_largest}"

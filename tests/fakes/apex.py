"""A stand-in for the one extension of Apex that Megatron-Core's linear layers use.

``fused_weight_gradient_mlp_cuda`` adds the gradient of a weight into ``main_grad`` in the epilogue
of the product that makes it. Here it is a product and an addition, in the type of ``main_grad``.
"""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

#: How often it was called in this process; tests read and clear it.
COUNTS: dict[str, int] = {}


def wgrad_gemm_accum(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """``main_grad += grad_output^T total_input``, both ``[T, features]``."""
    if total_input.ndim != 2 or grad_output.ndim != 2:
        raise AssertionError("the extension takes matrices")
    COUNTS["wgrad"] = COUNTS.get("wgrad", 0) + 1
    wide = main_grad.dtype
    main_grad.add_(grad_output.to(wide).t() @ total_input.to(wide))


def install() -> None:
    """Let Megatron-Core's layers, already imported, find the extension."""
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=wgrad_gemm_accum, wgrad_gemm_accum_fp16=wgrad_gemm_accum
    )
    layers._grad_accum_fusion_available = True

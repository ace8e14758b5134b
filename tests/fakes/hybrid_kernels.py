"""Stand-ins in torch for the kernels of Mamba-2, the gated delta net and latent attention.

mamba-ssm, causal-conv1d, flash-linear-attention and Transformer Engine bring them, for GPUs alone.
Each stand-in is the formula that its kernel's documentation states, the recurrences token by token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def install() -> None:
    """Put them where Megatron-Core looks for the kernels, for this process.

    What Megatron-Core computes in fp32 around the kernels is fp64 then, so that a model in fp64 is
    one throughout and can be compared with a reference.
    """
    from megatron.core.ssm import mamba_mixer
    from megatron.core.ssm.gated_delta_net import common, gdn
    from megatron.core.transformer import multi_latent_attention

    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.mamba_split_conv1d_scan_combined = split_conv1d_scan
    mamba_mixer.ExtendedRMSNorm = GroupedRMSNorm
    common.HAVE_FLA = True
    common.l2norm = l2norm
    gdn.causal_conv1d = causal_conv1d
    gdn.chunk_gated_delta_rule = gated_delta_rule
    multi_latent_attention.TELinear = WholeLinear
    # Megatron-Core compiles what is around the kernels, which takes longer than these tests.
    torch._dynamo.config.disable = True
    Tensor.float = Tensor.double  # type: ignore[method-assign]


def _causal(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A depthwise convolution over what came before; ``[b, l, d]``, weights ``[d, w]``."""
    width = weight.size(1)
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    out = F.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.size(0))
    return F.silu(out).transpose(1, 2)


def split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    *,
    D: Tensor,
    headdim: int,
    ngroups: int,
    **kwargs: Any,
) -> Tensor:
    """Mamba-2's convolution, scan and gate; ``[b, l, 2 d + 2 g n + h]`` to ``[b, l, d]``."""
    assert kwargs["activation"] == "silu"
    heads = dt_bias.numel()
    inner, state = heads * headdim, (conv1d_weight.size(0) - heads * headdim) // 2
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * state, heads], dim=-1)
    x, B, C = _causal(xbc, conv1d_weight, conv1d_bias).split([inner, state, state], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    B, C = (
        part.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, dim=2)
        for part in (B, C)
    )
    dt = F.softplus(dt + dt_bias)
    hidden = x.new_zeros(x.size(0), heads, headdim, B.size(-1))
    outputs = []
    for t in range(x.size(1)):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        update = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        hidden = decay * hidden + update
        outputs.append((hidden * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1).flatten(2) * F.silu(z)


class GroupedRMSNorm(nn.Module):
    """mamba-ssm's RMSNorm over groups of channels, without a gate of its own."""

    def __init__(self, hidden_size, eps, group_size, norm_before_gate, device, dtype):
        super().__init__()
        assert not norm_before_gate
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (-1, self.group_size))
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return (grouped * scale).flatten(-2) * self.weight

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def l2norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Any:
    assert kwargs["activation"] in ("silu", "swish")
    return _causal(x, weight, bias), None


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, **kwargs: Any
) -> Any:
    """``S = exp(g) S + k beta (v - S k)``, ``o = S q / sqrt(d)``; heads ``[b, l, h, d]``."""
    del kwargs
    memory = q.new_zeros(q.size(0), q.size(2), q.size(3), v.size(3))
    outputs = []
    for t in range(q.size(1)):
        memory = memory * g[:, t].exp()[..., None, None]
        known = (memory * k[:, t, :, :, None]).sum(-2)
        change = (v[:, t] - known) * beta[:, t, :, None]
        memory = memory + k[:, t, :, :, None] * change[:, :, None, :]
        outputs.append((memory * q[:, t, :, :, None]).sum(-2) / q.size(3) ** 0.5)
    return torch.stack(outputs, dim=1), None


class LatentAttention(nn.Module):
    """Causal attention whose keys and values differ in width, in Transformer Engine's place."""

    def __init__(self, *, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        del kwargs
        # Megatron-Core makes two, and gives the second its scale.
        self.scale = softmax_scale or 1.0

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Tensor:
        del attention_mask, kwargs
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) * self.scale
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


class WholeLinear(nn.Module):
    """Transformer Engine's linear layer as latent attention has it: whole on every rank."""

    def __init__(self, input_size, output_size, *, parallel_mode, config, **kwargs):
        super().__init__()
        assert parallel_mode == "duplicated"
        assert not kwargs["bias"]
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None

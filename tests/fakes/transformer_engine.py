"""Stand-ins for Transformer Engine's layers on a CPU, where the real ones cannot be installed.

They have the constructors, attributes and return values that Megatron-Core's own wrappers use, and
compute what Transformer Engine documents: a norm in fp32, a product in the parameters' type, and
the tensor-parallel communication that ``parallel_mode`` and ``sequence_parallel`` ask for.

``install`` must run before anything of Megatron-Core is imported, or after ``forget_megatron``.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

VERSION = "2.6.0"


class _Product(torch.autograd.Function):
    """``x W^T`` whose dW may be added into ``weight.main_grad``, as the fused kernels do."""

    @staticmethod
    def forward(ctx, x, weight, fuse):
        ctx.save_for_backward(x, weight)
        ctx.fuse = fuse
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dweight = None
        if weight.requires_grad:
            dweight = dy.flatten(0, -2).t() @ x.flatten(0, -2)
            if ctx.fuse:
                weight.main_grad.add_(dweight)
                weight.grad_added_to_main_grad = True
                # Transformer Engine hands autograd a tensor of no meaning here.
                dweight = torch.zeros_like(weight)
        return dy @ weight, dweight, None


class _Norm(nn.Module):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=False,
        zero_centered_gamma=False,
        hidden_size=None,  # the name of old, which Megatron-Core used until 0.16
        **kwargs,
    ):
        super().__init__()
        hidden_size = hidden_size if normalized_shape is None else normalized_shape
        where = {"dtype": kwargs.get("params_dtype"), "device": kwargs.get("device")}
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight = nn.Parameter(
            torch.full((hidden_size,), float(not zero_centered_gamma), **where)
        )
        self.weight.sequence_parallel = sequence_parallel
        if self.biased:
            self.bias = nn.Parameter(torch.zeros(hidden_size, **where))
            self.bias.sequence_parallel = sequence_parallel

    def forward(self, x):
        bias = self.bias if self.biased else None
        return _normalise(x, self.weight, bias, self.eps, self.zero_centered_gamma)


class LayerNorm(_Norm):
    biased = True


class RMSNorm(_Norm):
    biased = False


def _normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    COUNTS["norm"] = COUNTS.get("norm", 0) + 1
    wide = torch.promote_types(x.dtype, torch.float32)
    y, gamma = x.to(wide), weight.to(wide) + (1 if centred else 0)
    if bias is not None:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * gamma
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


#: How often something was computed in this process; tests read and clear it.
COUNTS: dict[str, int] = {}


class _Module(nn.Module):
    """What Linear and LayerNormLinear share."""

    def _set_up(self, in_features, out_features, tp_group, tp_size, parallel_mode, kwargs):
        self.tp_group = tp_group
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and kwargs.get("sequence_parallel", False)
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.rng_tracker_name = kwargs.get("rng_tracker_name")
        self.fuse_wgrad_accumulation = kwargs.get("fuse_wgrad_accumulation", False)
        self.use_bias = kwargs.get("bias", True)
        self.return_bias = kwargs.get("return_bias", False)
        self.apply_bias = self.use_bias and not self.return_bias
        self.gemm_bias_unfused_add = parallel_mode == "row" and self.apply_bias
        # A real layer's flags for communication that overlaps the product.
        self.ub_overlap_rs_fprop = False
        where = {"dtype": kwargs.get("params_dtype"), "device": kwargs.get("device")}
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **where))
        if self.weight.device.type != "meta":
            kwargs["init_method"](self.weight)
        if self.use_bias:
            self.bias = nn.Parameter(torch.zeros(self.out_features, **where))
        else:
            self.bias = torch.Tensor()
        if parallel_mode == "column":
            self.weight.tensor_model_parallel, self.weight.partition_dim = True, 0
        elif parallel_mode == "row":
            self.weight.tensor_model_parallel, self.weight.partition_dim = True, 1

    def _product(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if x.size(-1) != self.in_features:
            raise AssertionError("GEMM not possible")
        if self.parallel_mode == "column" and self.tp_size > 1:
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, True, group=self.tp_group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        y = _Product.apply(x, self.weight, self.fuse_wgrad_accumulation)
        if self.apply_bias and not self.gemm_bias_unfused_add:
            y = y + self.bias
        if self.parallel_mode == "row" and self.tp_size > 1:
            if self.sequence_parallel:
                y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
            else:
                y = mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group)
        return y + self.bias if self.gemm_bias_unfused_add else y


class Linear(_Module):
    def __init__(
        self,
        in_features,
        out_features,
        *,
        tp_group=None,
        tp_size=1,
        parallel_mode=None,
        **kwargs: Any,
    ):
        super().__init__()
        kwargs.setdefault("init_method", nn.init.normal_)
        self._set_up(in_features, out_features, tp_group, tp_size, parallel_mode, kwargs)

    def forward(self, inp, is_first_microbatch=None):
        y = self._product(inp)
        return (y, self.bias) if self.return_bias else y


class LayerNormLinear(_Module):
    def __init__(
        self,
        in_features,
        out_features,
        *,
        eps=1e-5,
        tp_group=None,
        tp_size=1,
        parallel_mode=None,
        normalization="LayerNorm",
        zero_centered_gamma=False,
        return_layernorm_output=False,
        **kwargs: Any,
    ):
        super().__init__()
        kwargs.setdefault("init_method", nn.init.normal_)
        self._set_up(in_features, out_features, tp_group, tp_size, parallel_mode, kwargs)
        self.eps, self.normalization = eps, normalization
        self.zero_centered_gamma = zero_centered_gamma
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = False
        where = {"dtype": kwargs.get("params_dtype"), "device": kwargs.get("device")}
        self.layer_norm_weight = nn.Parameter(
            torch.full((in_features,), float(not zero_centered_gamma), **where)
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, **where))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def forward(self, inp, is_first_microbatch=None):
        if self.return_layernorm_output:
            raise NotImplementedError("this stand-in does not return the norm's output")
        bias = self.layer_norm_bias
        normed = _normalise(inp, self.layer_norm_weight, bias, self.eps, self.zero_centered_gamma)
        y = self._product(normed)
        return (y, self.bias) if self.return_bias else y


class DotProductAttention(nn.Module):
    """Causal attention over whole sequences; what else the real one does is refused."""

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        softmax_scale=None,
        **kwargs: Any,
    ):
        super().__init__()
        if attention_dropout:
            raise NotImplementedError("this stand-in drops nothing; set attention_dropout=0")
        self.query_heads_per_group = num_attention_heads // (num_gqa_groups or num_attention_heads)
        self.softmax_scale = softmax_scale

    def forward(self, query, key, value, mask=None, *, attn_mask_type="causal", **kwargs: Any):
        if attn_mask_type != "causal" or query.dim() != 4 or query.size(0) != key.size(0):
            raise NotImplementedError("this stand-in attends causally over sbhd sequences only")
        # [s, b, heads, d] to [b, heads, s, d], each key and value once for every query head.
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = (x.repeat_interleave(self.query_heads_per_group, dim=1) for x in (k, v))
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale
        )
        return y.permute(2, 0, 1, 3).flatten(2)


def apply_rotary_pos_emb(t, freqs, tensor_format="sbhd", interleaved=False, **kwargs: Any):
    """Turn the first half of each head's channels against the second, as far as ``freqs`` go."""
    if tensor_format != "sbhd" or interleaved:
        raise NotImplementedError("this stand-in turns halves of sbhd sequences only")
    turned, rest = t.split([freqs.size(-1), t.size(-1) - freqs.size(-1)], dim=-1)
    first, second = turned.float().chunk(2, dim=-1)
    angles = freqs[: t.size(0)].float()
    rotated = torch.cat((-second, first), dim=-1)
    turned = turned.float() * angles.cos() + rotated * angles.sin()
    return torch.cat((turned.to(t.dtype), rest), dim=-1)


def _placeholder(name: str) -> type:
    def refuse(self, *args, **kwargs):
        raise NotImplementedError(f"the stand-in for Transformer Engine has no {name}")

    return type(name, (nn.Module,), {"__init__": refuse})


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []  # a package, so that absent submodules raise ImportError
    for key, value in members.items():
        setattr(module, key, value)
    return module


class QuantizedTensor(Tensor):
    """The class that real fp8 weights are of; none is made here."""


class _Tracker:
    """Base of Megatron's wrapper round Transformer Engine's random streams; never made here."""


def forget_megatron() -> None:
    """Drop what was imported without Transformer Engine, so that it is imported anew."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("megatron", "bdlora_megatron"):
            del sys.modules[name]


def install() -> None:
    """Put the stand-ins where ``import transformer_engine`` finds them.

    Raises:
        RuntimeError: The real one is there, or Megatron-Core was imported already.
    """
    if "transformer_engine" in sys.modules:
        raise RuntimeError("transformer_engine is imported already")
    if "megatron.core" in sys.modules:
        raise RuntimeError("Megatron-Core was imported already; call forget_megatron() first")
    names = ("SwiGLU", "GEGLU", "ReGLU", "GELU", "ReLU", "Sequential", "FusibleOperation")
    modules = {
        "transformer_engine.pytorch.ops": _module(
            "transformer_engine.pytorch.ops", **{name: _placeholder(name) for name in names}
        ),
        "transformer_engine.pytorch.fp8": _module(
            "transformer_engine.pytorch.fp8",
            FP8GlobalStateManager=type("FP8GlobalStateManager", (), {}),
            fp8_autocast=_placeholder("fp8_autocast"),
            # From 0.18 on, Megatron-Core has no Transformer Engine where this cannot be imported.
            fp8_model_init=_placeholder("fp8_model_init"),
        ),
        "transformer_engine.pytorch.distributed": _module(
            "transformer_engine.pytorch.distributed",
            CudaRNGStatesTracker=_Tracker,
            activation_recompute_forward=_placeholder("activation_recompute_forward"),
        ),
        "transformer_engine.pytorch.attention": _module("transformer_engine.pytorch.attention"),
        "transformer_engine.pytorch.attention.rope": _module(
            "transformer_engine.pytorch.attention.rope", apply_rotary_pos_emb=apply_rotary_pos_emb
        ),
        "transformer_engine.pytorch.tensor": _module(
            "transformer_engine.pytorch.tensor", QuantizedTensor=QuantizedTensor
        ),
        "transformer_engine.common.recipe": _module(
            "transformer_engine.common.recipe", DelayedScaling=type("DelayedScaling", (), {})
        ),
    }
    kinds = (Linear, LayerNormLinear, LayerNorm, RMSNorm, DotProductAttention)
    classes = {kind.__name__: kind for kind in kinds}
    for name in ("GroupedLinear", "TransformerLayer"):
        classes[name] = _placeholder(name)
    pytorch = _module("transformer_engine.pytorch", **classes)
    common = _module("transformer_engine.common")
    top = _module("transformer_engine", pytorch=pytorch, common=common, __version__=VERSION)
    modules |= {
        "transformer_engine": top,
        "transformer_engine.pytorch": pytorch,
        "transformer_engine.common": common,
    }
    for name, module in modules.items():
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)

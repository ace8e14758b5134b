"""Megatron-Core's Transformer Engine layers over the stand-ins, and what they must compute.

Import this in a rank only, after ``stand_ins``: Megatron-Core decides on import whether there is a
Transformer Engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as extension
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from bdlora_megatron.config import Layout
from bdlora_megatron.layers.classes import lora_layer
from bdlora_megatron.layers.te_linear import TE_CLASSES
from bdlora_megatron.runtime import record_collectives
from bdlora_megatron.runtime.versions.layers import nested_submodules
from tests.fakes.transformer_engine import COUNTS
from tests.tolerances import assert_close
from tests.tp.layer_cases import (
    HIDDEN,
    Case,
    Reference,
    draw,
    fill,
    in_features,
    load_base,
    local_dx,
    local_input,
    local_output,
    lora_config,
    projections,
    transformer_config,
)


@dataclass(frozen=True, kw_only=True)
class TECase:
    """A layer over the stand-ins; ``norm`` is empty where the layer has none."""

    case: Case
    norm: str = ""
    bias: bool = False
    skip_bias_add: bool = False
    from_base: bool = True
    adapter: bool = True

    @property
    def kind(self) -> type:
        if not self.case.column:
            return extension.TERowParallelLinear
        if self.norm:
            return extension.TELayerNormColumnParallelLinear
        return extension.TEColumnParallelLinear


def build(te: TECase, reference: Reference, rank: int) -> Any:
    """The layer under test, or the plain one, filled with this rank's shares."""
    case = te.case
    config = transformer_config(case, reference.world_size)
    config.normalization = te.norm or "RMSNorm"
    kwargs = {"config": config, "init_method": torch.nn.init.zeros_, "is_expert": False}
    kwargs |= {"bias": te.bias, "skip_bias_add": te.skip_bias_add, "tp_comm_buffer_name": "fc1"}
    kwargs |= {"gather_output": False} if case.column else {"input_is_parallel": True}
    kind = te.kind
    if te.adapter and not te.from_base:
        kind, kwargs = (
            TE_CLASSES[kind],
            {**kwargs, "lora": lora_config(case), "lora_name": case.layer},
        )
    layer = kind(in_features(case), sum(projections(case).values()), **kwargs)
    if te.adapter and te.from_base:
        layer = lora_layer(layer)
        layer.attach_config(lora_config(case), case.layer)
    (fill if te.adapter else load_base)(layer, reference, rank)
    layer.weight.requires_grad_(case.base_trainable)
    gains = norm_gains(te)
    if gains:
        layer.layer_norm_weight.data.copy_(gains["weight"])
        if te.norm == "LayerNorm":
            layer.layer_norm_bias.data.copy_(gains["bias"])
    if te.bias:
        whole = bias(te)
        layer.bias.data.copy_(whole.chunk(reference.world_size)[rank] if case.column else whole)
    return layer


def bias(te: TECase) -> Tensor:
    return draw(torch.Generator().manual_seed(5), sum(projections(te.case).values()))


def norm_gains(te: TECase) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {n: draw(generator, HIDDEN) for n in ("weight", "bias")} if te.norm else {}


def expected(te: TECase, reference: Reference) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole output without bias, and the norm's gains with their gradients."""
    gains = {name: gain.requires_grad_(True) for name, gain in norm_gains(te).items()}
    reference.x.requires_grad_(True)
    x = reference.x
    if te.norm == "RMSNorm":
        x = torch.nn.functional.rms_norm(x, (HIDDEN,), gains["weight"], 1e-5)
    elif te.norm == "LayerNorm":
        x = torch.nn.functional.layer_norm(x, (HIDDEN,), gains["weight"], gains["bias"], 1e-5)
    return reference.run(x), gains


def run(layer: Any, reference: Reference, rank: int) -> tuple[Tensor, Any, Tensor, list, list]:
    """One forward and backward: output, bias, dX and the collectives of each."""
    x = local_input(reference, rank)
    with record_collectives() as forward:
        y, left = layer(x)
    with record_collectives() as backward:
        y.backward(local_output(reference, reference.grad_y, rank).to(y.dtype))
    return y, left, x.grad, forward.calls, backward.calls


def check(te: TECase, rank: int, world_size: int) -> None:
    """One layer against the whole fp64 reference, and its collectives against the base's."""
    case = te.case
    reference = Reference.make(case, world_size)
    wanted, gains = expected(te, reference)
    layer = build(te, reference, rank)
    COUNTS.clear()
    y, left, dx, forward, backward = run(layer, reference, rank)
    assert COUNTS.get("norm", 0) == bool(te.norm), "the norm must be computed exactly once"
    if te.bias and te.skip_bias_add:
        assert left is layer.bias
    elif te.bias:
        wanted = wanted + bias(te)
    assert_close(y, local_output(reference, wanted, rank), f"y [{te}]")
    assert_close(dx, local_dx(reference, rank), f"dX [{te}]")
    for plan in layer.adapter.plans:
        name = plan.projection.name
        for factor, which in zip(layer.adapter.factors(plan), "AB", strict=True):
            share = reference.share(name, which, rank, grad=True)
            assert_close(factor.weight.grad, share, f"d{which} of {name!r} [{te}]")
    check_gains(te, layer, gains)
    plain = build(TECase(case=case, norm=te.norm, bias=te.bias, adapter=False), reference, rank)
    if case.layout is Layout.BDLORA:
        calls, base = (forward, backward), run(plain, reference, rank)[3:]
        assert calls == base, f"the base layer communicates {base}, this one {calls}"


def check_gains(te: TECase, layer: Any, gains: dict[str, Tensor]) -> None:
    for name in ("weight", "bias") if te.norm == "LayerNorm" else ("weight",) if te.norm else ():
        grad = getattr(layer, f"layer_norm_{name}").grad
        if te.case.sequence_parallel and layer.tp_group.size() > 1:
            # Of this rank's tokens only: Megatron sums it over ranks when the step is finished.
            torch.distributed.all_reduce(grad, group=layer.tp_group)
        assert_close(grad, gains[name].grad, f"d norm {name} [{te}]")


def te_spec() -> Any:
    """Megatron-Core's layer specification with its Transformer Engine linear layers."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer = spec.submodules
    attention, mlp = nested_submodules(layer.self_attention), nested_submodules(layer.mlp)
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    attention.linear_qkv = mlp.linear_fc1 = extension.TELayerNormColumnParallelLinear
    attention.linear_proj = mlp.linear_fc2 = extension.TERowParallelLinear
    return spec


def copy_weights(local: torch.nn.Module, te: torch.nn.Module) -> None:
    """Fill a model of ``te_spec`` with the weights of one of the local specification."""
    renamed = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    state = dict(local.named_parameters())
    for old, new in renamed.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    targets = dict(te.named_parameters())
    assert state.keys() == targets.keys()
    for name, tensor in state.items():
        targets[name].data.copy_(tensor)

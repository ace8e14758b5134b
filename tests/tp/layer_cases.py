"""One layer with an adapter, whole and in fp64: what every rank's share is compared with.

The reference knows nothing of ranks while it computes: dense matrices, autograd. Cutting a rank's
share out of it is written down here by hand, not taken from the code under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from bdlora_megatron.config import Layout, LoRAConfig
from bdlora_megatron.layers.linear import LoRAColumnParallelLinear, LoRARowParallelLinear

SEQUENCE, BATCH, HIDDEN = 12, 2, 24
HEADS, GROUPS, HEAD_DIM, FFN = 24, 12, 3, 36


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer, its adapter's layout and how it runs."""

    layer: str
    layout: Layout
    num_blocks: int = 1
    fused: bool = False
    sequence_parallel: bool = False
    regather: bool = False
    dtype: torch.dtype = torch.float64
    factor_dtype: torch.dtype | None = None
    base_trainable: bool = False
    gated: bool = True

    @property
    def column(self) -> bool:
        return self.layer in ("linear_qkv", "linear_fc1")

    @property
    def label(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in vars(self).items())


def lora_config(case: Case, **changes: Any) -> LoRAConfig:
    return LoRAConfig(
        rank=24,
        alpha=12.0,
        use_rslora=True,
        layout=case.layout,
        num_blocks=case.num_blocks if case.layout is Layout.BDLORA else None,
        fused=case.fused,
        regather_input=case.regather,
        dtype=case.factor_dtype,
        **changes,
    )


def transformer_config(case: Case, world_size: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=FFN,
        gated_linear_unit=case.gated,
        tensor_model_parallel_size=world_size,
        sequence_parallel=case.sequence_parallel and world_size > 1,
        params_dtype=case.dtype,
        use_cpu_initialization=True,
        add_bias_linear=False,
    )


def projections(case: Case) -> dict[str, int]:
    """Rows of each projection the layer holds."""
    return {
        "linear_qkv": {"q": HEADS * HEAD_DIM, "k": GROUPS * HEAD_DIM, "v": GROUPS * HEAD_DIM},
        "linear_fc1": {"gate": FFN, "up": FFN} if case.gated else {"": FFN},
        "linear_proj": {"": HIDDEN},
        "linear_fc2": {"": HIDDEN},
    }[case.layer]


def in_features(case: Case) -> int:
    return {"linear_proj": HEADS * HEAD_DIM, "linear_fc2": FFN}.get(case.layer, HIDDEN)


def in_layer_order(case: Case, rows: dict[str, Tensor], world_size: int) -> Tensor:
    """Stack projections' rows as Megatron-Core's whole layer has them, rank after rank."""
    if case.layer == "linear_qkv":
        grouped = [t.reshape(GROUPS, -1, t.size(-1)) for t in rows.values()]
        return torch.cat(grouped, dim=1).flatten(0, 1)
    if len(rows) == 2:
        halves = [t.chunk(world_size) for t in rows.values()]
        return torch.cat([half[rank] for rank in range(world_size) for half in halves])
    return next(iter(rows.values()))


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass
class Reference:
    """Whole tensors; factors packed, by projection name (one name, '', where fused)."""

    case: Case
    world_size: int
    x: Tensor
    grad_y: Tensor
    W: dict[str, Tensor]
    A: dict[str, Tensor] = field(default_factory=dict)
    B: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def make(cls, case: Case, world_size: int) -> Reference:
        generator = torch.Generator().manual_seed(7)
        inputs, rows = in_features(case), projections(case)
        whole = sum(rows.values())
        self = cls(
            case,
            world_size,
            x=draw(generator, SEQUENCE, BATCH, inputs),
            grad_y=draw(generator, SEQUENCE, BATCH, whole),
            W={name: draw(generator, size, inputs) for name, size in rows.items()},
        )
        rank, blocks = lora_config(case).rank, case.num_blocks
        for name, size in {"": whole}.items() if case.fused else rows.items():
            a_columns, b_columns = (inputs, rank // blocks)
            if not case.column:
                a_columns, b_columns = (inputs // blocks, rank)
            self.A[name] = draw(generator, rank, a_columns)
            self.B[name] = draw(generator, size, b_columns)
        if case.dtype is not torch.float64:
            # The reference starts from the numbers that the layer really holds.
            self.round_to(case.dtype)
        return self

    def round_to(self, dtype: torch.dtype) -> None:
        self.x, self.grad_y = self.x.to(dtype).double(), self.grad_y.to(dtype).double()
        for table in (self.W, self.A, self.B):
            table.update({name: t.to(dtype).double() for name, t in table.items()})

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.W.values(), *self.A.values(), *self.B.values()]

    def run(self, x: Tensor | None = None, adapter_x: Tensor | None = None) -> Tensor:
        """The layer's whole output, rows in the layer's order; gradients land on the leaves."""
        for leaf in self.leaves():
            leaf.requires_grad_(True)
            leaf.grad = None
        x = self.x if x is None else x
        adapter_x = x if adapter_x is None else adapter_x
        base = in_layer_order(self.case, self.W, self.world_size)
        y = x @ base.T + adapter_x @ self.delta().T
        y.backward(self.grad_y)
        return y.detach()

    def delta(self) -> Tensor:
        """The dense update ``s * B A`` with rows in the layer's order."""
        scale = 12.0 / math.sqrt(24)
        blocks = self.case.num_blocks
        if not self.case.column:
            return scale * self.B[""] @ torch.block_diag(*self.A[""].chunk(blocks))
        if self.case.fused:
            return scale * self.dense_fused_b() @ self.A[""]
        rows = {n: torch.block_diag(*b.chunk(blocks)) @ self.A[n] for n, b in self.B.items()}
        return scale * in_layer_order(self.case, rows, self.world_size)

    def dense_fused_b(self) -> Tensor:
        """Dense B of a fused adapter, in the layer's order."""
        B, blocks = self.B[""], self.case.num_blocks
        if self.case.layer == "linear_fc1" and self.case.gated:
            gate, up = (torch.block_diag(*half.chunk(blocks)) for half in B.chunk(2))
            return in_layer_order(self.case, {"gate": gate, "up": up}, self.world_size)
        return torch.block_diag(*B.chunk(blocks))

    def share(self, name: str, which: str, rank: int, *, grad: bool = False) -> Tensor:
        """One rank's share of a factor or of its gradient, by the table in ``layers.adapters``."""
        whole = (self.A if which == "A" else self.B)[name]
        whole = whole.grad if grad else whole.detach()
        layout, size = self.case.layout, self.world_size
        replicated = {("A", True), ("B", False)}
        if layout is Layout.HALF_SHARDED and (which, self.case.column) in replicated:
            return whole
        if which == "B" and self.case.fused and self.case.layer == "linear_fc1" and self.case.gated:
            return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
        dim = 0
        if not self.case.column:
            by_column = {Layout.BDLORA: "B"}.get(layout, "A")
            dim = 1 if which == by_column else 0
        return whole.chunk(size, dim=dim)[rank]


def build_layer(reference: Reference, rank: int) -> Any:
    """The layer under test, built by its constructor and filled with this rank's shares."""
    case, size = reference.case, reference.world_size
    config = transformer_config(case, size)
    rows = sum(projections(case).values())
    common = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
    common |= {"lora": lora_config(case), "lora_name": case.layer, "skip_bias_add": False}
    if case.column:
        layer = LoRAColumnParallelLinear(HIDDEN, rows, gather_output=False, **common)
    else:
        layer = LoRARowParallelLinear(in_features(case), rows, input_is_parallel=True, **common)
    fill(layer, reference, rank)
    layer.weight.requires_grad_(case.base_trainable)
    return layer


def build_base(reference: Reference, rank: int) -> Any:
    """The plain Megatron-Core layer with the same weight."""
    case, size = reference.case, reference.world_size
    config = transformer_config(case, size)
    rows = sum(projections(case).values())
    common = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
    common |= {"skip_bias_add": False}
    if case.column:
        layer = ColumnParallelLinear(HIDDEN, rows, gather_output=False, **common)
    else:
        layer = RowParallelLinear(in_features(case), rows, input_is_parallel=True, **common)
    load_base(layer, reference, rank)
    layer.weight.requires_grad_(case.base_trainable)
    return layer


def load_base(layer: Any, reference: Reference, rank: int) -> None:
    whole = in_layer_order(reference.case, reference.W, reference.world_size).detach()
    dim = 0 if reference.case.column else 1
    layer.weight.data.copy_(whole.chunk(reference.world_size, dim=dim)[rank])


def fill(layer: Any, reference: Reference, rank: int) -> None:
    load_base(layer, reference, rank)
    for name in reference.A:
        shares = (reference.share(name, which, rank) for which in ("A", "B"))
        layer.adapter.load(name, *shares)


def local_input(reference: Reference, rank: int) -> Tensor:
    """What this rank is given: the sequence shard, the feature shard, or all of X."""
    case, size = reference.case, reference.world_size
    x = reference.x.detach()
    if not case.column:
        x = x.chunk(size, dim=-1)[rank]
    elif case.sequence_parallel:
        x = x.chunk(size, dim=0)[rank]
    return x.to(case.dtype).clone().requires_grad_(True)


def local_output(reference: Reference, y: Tensor, rank: int) -> Tensor:
    """This rank's share of a whole output (or of its gradient)."""
    case, size = reference.case, reference.world_size
    if case.column:
        return y.chunk(size, dim=-1)[rank]
    return y.chunk(size, dim=0)[rank] if case.sequence_parallel else y


def local_dx(reference: Reference, rank: int) -> Tensor:
    case, size = reference.case, reference.world_size
    grad = reference.x.grad
    if not case.column:
        return grad.chunk(size, dim=-1)[rank]
    return grad.chunk(size, dim=0)[rank] if case.sequence_parallel else grad

"""Adapters that share what tests plant in them, in PEFT folders."""

from __future__ import annotations

import torch

from bdlora_megatron.blocks import reshard
from bdlora_megatron.compress import FolderSource
from bdlora_megatron.convert import read_adapter
from tests.unit.convert.peft_files import WIDTHS, write

#: Times are no part of the result.
RUN = {"report.json", "report.md", "errors.png"}


def numbers(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def spaces(random, basis_rank, *, layers=1, modules=WIDTHS):
    """Orthonormal U and V of every module."""
    return {
        (layer, module): (
            torch.linalg.qr(random(WIDTHS[module][1], basis_rank)).Q,
            torch.linalg.qr(random(WIDTHS[module][0], basis_rank)).Q,
        )
        for layer in range(layers)
        for module in modules
    }


def within(random, space, rank, *, noise=0.0, size=1.0):
    """The tensors of an adapter that lies in a space, with `noise` of its size beside it."""
    tensors = {}
    for (layer, module), (U, V) in space.items():
        stem = f"base_model.model.model.layers.{layer}.{module}.lora_"
        B, A = U @ random(U.shape[1], rank), random(rank, V.shape[1]) @ V.t()
        B += noise * B.norm() / B.numel() ** 0.5 * random(*B.shape)
        A += noise * A.norm() / A.numel() ** 0.5 * random(*A.shape)
        tensors[f"{stem}B.weight"], tensors[f"{stem}A.weight"] = size * B, A.contiguous()
    return tensors


def save(folder, tensors, *, rank, dtype=torch.float64, alpha=None, **config):
    folder.parent.mkdir(parents=True, exist_ok=True)
    cast = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    return write(folder, cast, r=rank, lora_alpha=rank if alpha is None else alpha, **config)


def sources_of(*folders):
    return [FolderSource(name=folder.name, path=folder) for folder in folders]


def dense(factors):
    """The update in fp64."""
    whole = reshard(factors, 1)
    return factors.scale * whole.B.double() @ whole.A.double()


def updates(folder):
    """Every module's update of an adapter, in fp64."""
    return {str(key): dense(factors) for key, factors in read_adapter(folder).modules.items()}


def distance(one, other):
    """Relative Frobenius distance of two adapters' updates, all modules together."""
    assert one.keys() == other.keys()
    lost = sum(float((one[key] - other[key]).square().sum()) for key in one)
    return (lost / sum(float(update.square().sum()) for update in one.values())) ** 0.5


def contents(folder):
    """Every file that a run of the same adapters and options makes again."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in RUN
    }

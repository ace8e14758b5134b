"""One module's low-rank update, block-diagonal in one factor.

Letters in shapes: I in features, O out features, R total rank, N blocks. Inside this package the
two orientations share one form: the blocked side has width W (O when B is blocked, I when A is),
the dense side has width D (the other one), and block n is `packed[n] @ dense[n]`, `[W / N, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bdlora_megatron.errors import ConfigError, ShapeError

__all__ = ["BlockFactors", "Blocked", "block_views", "from_block_views", "in_blocks", "in_rows"]

Blocked: TypeAlias = Literal["A", "B"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockFactors:
    """The update `s * B A` of one linear module, `[O, I]`, with one factor block-diagonal.

    | modules | blocked | A | B |
    |---|---|---|---|
    | column-parallel | `"B"` | `[R, I]` dense | `[O, R / N]` packed |
    | row-parallel | `"A"` | `[R, I / N]` packed | `[O, R]` dense |

    A packed factor is the stack of its N diagonal blocks on dimension 0, PEFT's order. With
    `num_blocks=1` packed and dense are the same and the update is a vanilla LoRA's.

    Where `parts` says that B's rows are several stretches, such as those of Mamba's z, x, B, C and
    dt, each stretch is cut into N pieces by itself and block n has the n-th piece of each. The rows
    stay where they are: row o of a packed B is row o of the update.

    Raises:
        ConfigError: If `num_blocks`, `blocked` or `scale` has no meaning.
        ShapeError: If the two factors cannot be those of one module with `num_blocks` blocks.
    """

    A: Tensor
    """Down-projection, read by rows of the rank."""
    B: Tensor
    """Up-projection."""
    num_blocks: int
    """N, the number of diagonal blocks of the blocked factor."""
    blocked: Blocked
    """Which factor is block-diagonal."""
    scale: float
    """s. Explicit, because alpha / r would change meaning whenever a reshard changes R."""
    parts: tuple[int, ...] = ()
    """Rows of each stretch of a blocked B that blocks cut by itself; empty for one stretch."""

    def __post_init__(self) -> None:
        _check_settings(self.num_blocks, self.blocked, self.scale)
        _check_tensors(self.A, self.B)
        _check_shapes(self)

    @property
    def rank(self) -> int:
        """R, the total rank over all blocks."""
        return self.A.shape[0]

    @property
    def in_features(self) -> int:
        """I, the width of the module's input."""
        return self.A.shape[1] * (self.num_blocks if self.blocked == "A" else 1)

    @property
    def out_features(self) -> int:
        """O, the width of the module's output."""
        return self.B.shape[0]

    @property
    def num_parameters(self) -> int:
        """The numbers stored in both factors."""
        return self.A.numel() + self.B.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both factors."""
        return self.A.dtype


def block_views(factors: BlockFactors) -> tuple[Tensor, Tensor]:
    """The two factors in the orientation-free form, as views; a copy of B's rows with `parts`.

    Returns:
        `packed [N, W / N, R / N]` and `dense [N, R / N, D]`. Their products are the blocks of
        `B A` when B is blocked, and of its transpose when A is.
    """
    blocks = factors.num_blocks
    if factors.blocked == "B":
        return in_blocks(factors.B, blocks, factors.parts), factors.A.unflatten(0, (blocks, -1))
    packed = factors.A.unflatten(0, (blocks, -1)).transpose(1, 2)
    return packed, factors.B.t().unflatten(0, (blocks, -1))


def in_blocks(rows: Tensor, num_blocks: int, parts: Sequence[int] = ()) -> Tensor:
    """Rows by block, `[O, ...]` to `[N, O / N, ...]`: of each stretch the n-th piece to block n."""
    if not parts:
        whole: Tensor = rows.unflatten(0, (num_blocks, -1))
        return whole
    pieces = [part.unflatten(0, (num_blocks, -1)) for part in rows.split(list(parts))]
    return torch.cat(pieces, dim=1)


def in_rows(blocks: Tensor, parts: Sequence[int] = ()) -> Tensor:
    """The inverse of `in_blocks`."""
    if not parts:
        return blocks.flatten(0, 1)
    sizes = [part // blocks.shape[0] for part in parts]
    return torch.cat([piece.flatten(0, 1) for piece in blocks.split(sizes, dim=1)])


def from_block_views(
    packed: Tensor,
    dense: Tensor,
    *,
    blocked: Blocked,
    scale: float,
    parts: tuple[int, ...] = (),
) -> BlockFactors:
    """Put the orientation-free form back into the factors of a module.

    Args:
        packed: `[N, W / N, R / N]`.
        dense: `[N, R / N, D]`.
        blocked: Which factor is block-diagonal.
        scale: s.
        parts: As of the update.
    """
    if blocked == "B":
        A, B = dense.flatten(0, 1), in_rows(packed, parts)
    else:
        A, B = packed.transpose(1, 2).flatten(0, 1), dense.flatten(0, 1).t()
    return BlockFactors(
        A=A.contiguous(),
        B=B.contiguous(),
        num_blocks=packed.shape[0],
        blocked=blocked,
        scale=scale,
        parts=parts,
    )


def _check_settings(num_blocks: int, blocked: str, scale: float) -> None:
    if num_blocks < 1:
        raise ConfigError(
            f"num_blocks={num_blocks} is not a number of blocks; use 1 for vanilla LoRA"
        )
    if blocked not in ("A", "B"):
        raise ConfigError(
            f'blocked={blocked!r} names no factor; use "B" for a column-parallel module '
            'and "A" for a row-parallel one'
        )
    if not math.isfinite(scale):
        raise ConfigError(f"scale={scale} is not finite; use alpha / r or alpha / sqrt(r)")


def _check_tensors(A: Tensor, B: Tensor) -> None:
    for name, factor in (("A", A), ("B", B)):
        if factor.dim() != 2:
            raise ShapeError(
                f"factor {name} has shape {list(factor.shape)}, wanted two dimensions; "
                "pass a packed factor as the stack of its blocks on dimension 0"
            )
        if factor.numel() == 0:
            raise ShapeError(
                f"factor {name} has shape {list(factor.shape)}, wanted no empty dimension; "
                "leave a module without an update out of the adapter"
            )
        if not factor.is_floating_point():
            raise ShapeError(
                f"factor {name} has dtype {factor.dtype}, wanted a floating dtype; "
                "cast or dequantise it first"
            )
    if A.dtype != B.dtype:
        raise ShapeError(
            f"factor A is {A.dtype} and factor B is {B.dtype}, wanted one dtype; cast one of them"
        )


def _check_shapes(factors: BlockFactors) -> None:
    A, B, blocks = factors.A, factors.B, factors.num_blocks
    got = f"A {list(A.shape)}, B {list(B.shape)}"
    if A.shape[0] % blocks:
        raise ShapeError(
            f"rank {A.shape[0]} ({got}) is not a multiple of num_blocks={blocks}; "
            "pad the rank or use a divisor of it"
        )
    if factors.blocked == "A":
        if factors.parts:
            raise ShapeError("parts are stretches of a blocked B's rows, and A is blocked here")
        if B.shape[1] != A.shape[0]:
            raise ShapeError(
                f'{got} do not fit blocked="A", num_blocks={blocks}: wanted A [R, I / {blocks}] '
                "and B [O, R] with one R; check which factor is packed"
            )
        return
    if B.shape[1] * blocks != A.shape[0]:
        raise ShapeError(
            f'{got} do not fit blocked="B", num_blocks={blocks}: wanted A [R, I] and '
            f"B [O, R / {blocks}] with one R; check which factor is packed"
        )
    if B.shape[0] % blocks:
        raise ShapeError(
            f"out_features {B.shape[0]} ({got}) is not a multiple of num_blocks={blocks}; "
            "use a number of blocks that divides it"
        )
    if factors.parts and sum(factors.parts) != B.shape[0]:
        raise ShapeError(
            f"parts {list(factors.parts)} make {sum(factors.parts)} rows, and B has {B.shape[0]}; "
            "pass the stretches of this module's rows"
        )
    if any(part < 1 or part % blocks for part in factors.parts):
        raise ShapeError(
            f"parts {list(factors.parts)} are no multiples of num_blocks={blocks}; use a number of "
            "blocks that divides each of them"
        )

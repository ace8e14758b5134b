"""The core of one update in a basis as it is stored, and what is lost."""

from __future__ import annotations

import torch
from torch import Tensor

from bdlora_megatron.compress.fit import CoreKind
from bdlora_megatron.compress.stack import Pair, gram_norm2

__all__ = ["Projector"]


class Projector:
    """A basis in the type it is stored in, that updates are fitted to.

    Rounding leaves a basis not quite orthonormal; the core is the best for the basis as it is.

    Attributes:
        U: `[O, k]`, as it is stored.
        V: `[I, k]`.
    """

    def __init__(self, U: Tensor, V: Tensor, core: CoreKind) -> None:
        self.U, self.V, self._core = U, V, core
        self._wide = U.double(), V.double()
        self._grams = tuple(side.t() @ side for side in self._wide)

    def project(self, pair: Pair, scale: float) -> tuple[Tensor, float]:
        """The best core of an update `scale * B A`.

        Args:
            pair: B `[O, r]` and A `[r, I]`.
            scale: s.

        Returns:
            The core, `[k, k]` or `[k]`, in the basis's type, and the square of the error's
            Frobenius norm with that type's rounding, in fp64.
        """
        (U, V), (U_gram, V_gram) = self._wide, self._grams
        B, A = (factor.double() for factor in pair)
        inside = scale * ((U.t() @ B) @ (A @ V))
        if self._core == "full":
            exact = torch.linalg.solve(V_gram, torch.linalg.solve(U_gram, inside).t()).t()
        else:
            exact = torch.linalg.solve(U_gram * V_gram, inside.diagonal())
        stored = exact.to(self.U.dtype).contiguous()
        S = stored.double() if self._core == "full" else stored.double().diag()
        norm2 = scale**2 * gram_norm2(pair)
        error2 = norm2 - 2 * (inside * S).sum() + ((U_gram @ S @ V_gram) * S).sum()
        return stored, max(float(error2), 0.0)

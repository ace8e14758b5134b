"""What a compression makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from bdlora_megatron.compress.fit import CORES, CoreKind
from bdlora_megatron.convert.tensor_files import FLOATS
from bdlora_megatron.errors import ConfigError

__all__ = ["FORMS", "CompressOptions", "Form"]

Form: TypeAlias = Literal["shared", "blocked"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressOptions:
    """How a collection is compressed.

    Raises:
        ConfigError: Values are out of range, or two disagree. All are listed.
    """

    rank: int
    """k, the columns of a basis, over all slices."""

    core: CoreKind = "full"
    """What an adapter keeps of its own in each module: `full`, k x k numbers, or `diagonal`, k."""

    form: Form = "shared"
    """`shared`: one basis of the whole module; `blocked`: one of k / P for each rank's slice."""

    tp: int | None = None
    """P, the tensor-parallel size that the blocked form is for."""

    clusters: int = 1
    """The most clusters of adapters, each with bases of its own."""

    cluster_modules: int = 32
    """How many modules clusters and outliers are found with, spread over the model; 0 for all."""

    max_error: float | None = None
    """Adapters that would lose more than this share of their norm stay whole."""

    dtype: torch.dtype | None = None
    """The type of bases and cores; the widest of the adapters' own when unset."""

    def __post_init__(self) -> None:
        blocks = 1 if self.tp is None else self.tp
        checks = {
            f"core={self.core!r}; wanted one of {', '.join(CORES)}": self.core in CORES,
            f"form={self.form!r}; wanted one of {', '.join(FORMS)}": self.form in FORMS,
            f"rank={self.rank}; wanted 1 or more": self.rank >= 1,
            f"tp={self.tp}; wanted 1 or more": blocks >= 1,
            f"clusters={self.clusters}; wanted 1 or more": self.clusters >= 1,
            f"cluster_modules={self.cluster_modules}; wanted 1 or more, or 0 for all modules": (
                self.cluster_modules >= 0
            ),
            f"max_error={self.max_error}; wanted a share of the norm from 0 to 1": (
                self.max_error is None or 0 <= self.max_error <= 1
            ),
            f"dtype={self.dtype}; wanted one of {[*map(str, FLOATS.values())]}": (
                self.dtype is None or self.dtype in FLOATS.values()
            ),
            "the blocked form needs the tensor-parallel size that it is for (--for-tp, tp=)": (
                self.form != "blocked" or self.tp is not None
            ),
            f"tp={self.tp} is for the blocked form; the shared form serves at every size: leave "
            "it out, or pass form blocked": self.form != "shared" or self.tp is None,
            f"rank={self.rank} is no multiple of tp={self.tp}; each slice's basis has rank / tp "
            "columns": blocks < 1 or self.rank % blocks == 0,
        }
        problems = [what for what, fine in checks.items() if not fine]
        if math.isnan(self.max_error or 0.0):
            problems.append("max_error is not a number")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def num_blocks(self) -> int:
        """N, the slices that are fitted by themselves."""
        return self.tp or 1

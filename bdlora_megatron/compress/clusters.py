"""Which adapters share a basis: decisions on errors alone, the same wherever they are made.

Adapters are counted in an order that their contents decide, so that ties are too. Letters in
shapes: n adapters, c candidates for seeds, C clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Assignment", "after_round", "seeded"]

#: A gain of less than this is rounding, and nobody moves for it.
_NO_GAIN = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """A cluster for every adapter, and the adapters that bases are fitted to.

    Attributes:
        cluster: Each adapter's.
        active: Whether its cluster's bases are fitted to it; others are outliers.
        retried: Whether outliers that fit the bases without them were taken back.
    """

    cluster: tuple[int, ...]
    active: tuple[bool, ...]
    retried: bool = False

    @property
    def count(self) -> int:
        """C."""
        return max(self.cluster) + 1

    def members(self, cluster: int, *, active: bool = False) -> tuple[int, ...]:
        """The adapters of a cluster, or those that its bases are fitted to."""
        return tuple(
            i
            for i, own in enumerate(self.cluster)
            if own == cluster and (self.active[i] or not active)
        )


def seeded(distances: Tensor, count: int) -> Assignment:
    """Choose adapters that stand for clusters, and put every adapter to the nearest.

    Each next seed is the one that lowers the sum of distances most (as k-medoids start), so that a
    lonely adapter is no seed as long as a group is without one.

    Args:
        distances: `[c, n]`: what the space of candidate c alone would lose of adapter i.
        count: The most clusters; fewer where more would win nothing.

    Returns:
        The start, with every adapter active.
    """
    nearest = torch.full((distances.shape[1],), torch.inf, dtype=distances.dtype)
    seeds: list[int] = []
    while len(seeds) < count:
        sums = torch.minimum(distances, nearest).sum(1)
        best = _first_least(sums)
        if seeds and nearest.sum() - sums[best] <= _NO_GAIN:
            break
        seeds.append(best)
        nearest = torch.minimum(nearest, distances[best])
    chosen = distances[seeds]
    own = [_first_least(column) for column in chosen.t()]
    return _numbered(own, [True] * len(own))


def after_round(
    assignment: Assignment, errors: Tensor, shares: Tensor, max_error: float | None
) -> Assignment:
    """Where adapters go once every cluster's bases are fitted.

    Args:
        assignment: Where they are.
        errors: `[n, C]`: the sum over modules of each adapter's squared relative errors.
        shares: `[n, C]`: the error of each adapter as a share of its norm, all modules together.
        max_error: The largest share with which an adapter is compressed.

    Returns:
        Where they go; an equal assignment where nobody moves and no outlier is left. Outliers are
        set aside when nobody moves, the worse half first: the bases lose what was in them for the
        sake of outliers, and the others may then do. Those that do once none is left are taken
        back, once.
    """
    own = list(assignment.cluster)
    for i in range(len(own)):
        best = _first_least(errors[i])
        if errors[i, own[i]] - errors[i, best] > _NO_GAIN:
            own[i] = best
    active, retried = list(assignment.active), assignment.retried
    if tuple(own) == assignment.cluster and max_error is not None:
        reached = [float(shares[i, cluster]) for i, cluster in enumerate(own)]
        over = [i for i in range(len(own)) if active[i] and reached[i] > max_error]
        if over:
            middle = sorted(reached[i] for i in over)[len(over) // 2]
            for i in over:
                # All that are equally bad go together, or the order would decide.
                active[i] = reached[i] < middle - _NO_GAIN
        elif not retried:
            active = [was or share <= max_error for was, share in zip(active, reached, strict=True)]
            retried = active != list(assignment.active)
    _fill_empty(own, active, errors, assignment.count)
    return _numbered(own, active, retried=retried)


def _fill_empty(own: list[int], active: list[bool], errors: Tensor, count: int) -> None:
    """Give each cluster that nobody is left in to the adapter that fits worst where it is."""
    for cluster in range(count):
        if cluster in own:
            continue
        fitted = [c for c, is_active in zip(own, active, strict=True) if is_active]
        able = [i for i in range(len(own)) if active[i] and fitted.count(own[i]) > 1]
        worst = max(able, key=lambda i: (float(errors[i, own[i]]), -i), default=None)
        if worst is not None and errors[worst, own[worst]] > _NO_GAIN:
            own[worst] = cluster


def _numbered(own: list[int], active: list[bool], *, retried: bool = False) -> Assignment:
    """Clusters numbered by their first member, without gaps."""
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(own))}
    return Assignment(cluster=tuple(number[c] for c in own), active=tuple(active), retried=retried)


def _first_least(values: Tensor) -> int:
    """The first of those that are least, but for rounding."""
    return int((values <= values.min() + _NO_GAIN).nonzero()[0, 0])

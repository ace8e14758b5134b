"""Who shares a basis, decided on errors alone."""

from __future__ import annotations

import pytest
import torch

from bdlora_megatron.compress.clusters import Assignment, after_round, seeded


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def groups(sizes, *, alone=0, near=0.1, far=0.9):
    """Distances of some groups, and of adapters that are far from everyone."""
    own = [group for group, size in enumerate(sizes) for _ in range(size)]
    own += [len(sizes) + i for i in range(alone)]
    return matrix(*[[near if one == other else far for other in own] for one in own]) * (
        1 - torch.eye(len(own), dtype=torch.float64)
    )


def all_active(*cluster):
    return Assignment(cluster=cluster, active=(True,) * len(cluster))


def test_each_group_gets_a_seed_before_lonely_adapters_do():
    start = seeded(groups([4, 3, 5], alone=2), 3)
    assert start.cluster[:4] == (0,) * 4
    assert start.cluster[4:7] == (1,) * 3
    assert start.cluster[7:12] == (2,) * 5
    assert start.count == 3
    assert all(start.active)


def test_no_more_clusters_than_there_are_groups():
    assert seeded(groups([3, 3], near=0.0), 5).count == 2
    assert seeded(matrix([0.0, 0.0]), 2) == all_active(0, 0)


def test_adapters_go_where_they_lose_least_and_clusters_have_no_gaps():
    errors = matrix([5, 1, 9], [5, 9, 1], [1, 5, 9])
    after = after_round(all_active(0, 1, 2), errors, errors, None)
    # Numbered anew, by their first members.
    assert after == all_active(0, 1, 2)
    errors = matrix([1, 5], [1, 5], [5, 1])
    assert after_round(all_active(0, 1, 1), errors, errors, None) == all_active(0, 0, 1)


def test_nobody_moves_for_rounding():
    errors = matrix([1, 9], [9, 1], [1, 1 + 1e-12])
    start = all_active(0, 1, 1)
    assert after_round(start, errors, errors, None) == start


def test_a_cluster_that_everyone_left_goes_to_who_fits_worst():
    errors = matrix([0, 9], [3, 9], [2, 9], [1, 9])
    after = after_round(all_active(0, 0, 0, 1), errors, errors, None)
    assert after == all_active(0, 1, 0, 0)
    # Where everyone fits, it is dropped.
    errors = matrix([0, 9], [0, 9], [0, 9])
    assert after_round(all_active(0, 0, 1), errors, errors, None) == all_active(0, 0, 0)


def test_the_worse_half_of_outliers_is_set_aside_and_equals_together():
    start = all_active(0, 0, 0, 0, 0)
    errors = matrix([0.1], [0.5], [0.6], [0.7], [0.7])
    after = after_round(start, errors, errors, 0.2)
    assert after.active == (True, True, True, False, False)
    errors = matrix([0.1], [0.5], [0.5], [0.5], [0.5])
    assert after_round(start, errors, errors, 0.2).active == (True, False, False, False, False)
    assert after_round(start, errors, errors, 0.5) == start
    assert after_round(start, errors, errors, None) == start
    assert after.members(0) == (0, 1, 2, 3, 4)
    assert after.members(0, active=True) == (0, 1, 2)


def test_outliers_that_fit_the_rest_are_taken_back_once():
    aside = Assignment(cluster=(0, 0, 0), active=(True, False, False))
    errors = matrix([0.1], [0.2], [0.9])
    after = after_round(aside, errors, errors, 0.5)
    assert after == Assignment(cluster=(0, 0, 0), active=(True, True, False), retried=True)
    worse = matrix([0.1], [0.6], [0.9])
    again = after_round(after, worse, worse, 0.5)
    assert again.active == (True, False, False)
    assert after_round(again, errors, errors, 0.5) == again


def test_outliers_wait_until_nobody_moves():
    errors = matrix([0.9, 0.1], [0.9, 0.8])
    after = after_round(all_active(0, 1), errors, errors, 0.5)
    assert all(after.active)


def test_a_cluster_of_outliers_alone_is_left_by_them():
    start = Assignment(cluster=(0, 1), active=(True, False))
    errors = matrix([0.1, torch.inf], [0.9, torch.inf])
    after = after_round(start, errors, errors, 0.5)
    assert after == Assignment(cluster=(0, 0), active=(True, False))


@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_it_ends(limit):
    """Whatever the errors, outliers only ever grow in number."""
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(40, 5, generator=generator, dtype=torch.float64)
    state = all_active(*[i % 5 for i in range(40)])
    for _ in range(20):
        following = after_round(state, errors, errors, limit)
        if following == state:
            break
        state = following
    else:
        pytest.fail("it went on and on")

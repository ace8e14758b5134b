"""The search against a solution in closed form, and how little a wild measurement pulls."""

from __future__ import annotations

import pytest
import torch

from bdlora_megatron.bench.fit import least_errors

TIMES = torch.linspace(0.0, 2.0, 20, dtype=torch.float64)
START = torch.zeros(2, dtype=torch.float64)


def _line(measured):
    return lambda point: point[0] + point[1] * TIMES - measured


def _fit(errors_at, start=START, reach=100.0, near=0.1):
    return least_errors(errors_at, start, reach=reach, near=near)


def test_small_errors_are_fitted_by_least_squares():
    noise = 1e-3 * torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    measured = 3.0 - 2.0 * TIMES + noise
    columns = torch.stack([torch.ones_like(TIMES), TIMES], dim=1)
    wanted = torch.linalg.lstsq(columns, measured[:, None]).solution[:, 0]
    assert _fit(_line(measured)).tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_curve_is_found_from_afar():
    found = _fit(lambda p: p[0].exp() * (-p[1].exp() * TIMES).exp() - 5.0 * (-3.0 * TIMES).exp())
    assert found.exp().tolist() == pytest.approx([5.0, 3.0], rel=1e-3)


def test_a_wild_measurement_pulls_no_harder_than_a_bad_one():
    measured = 3.0 - 2.0 * TIMES
    measured[7] += 1e3
    assert _fit(_line(measured)).tolist() == pytest.approx([3.0, -2.0], abs=0.05)


def test_what_the_errors_do_not_tell_stays_and_nothing_leaves_its_reach():
    start = torch.tensor([0.0, 0.5], dtype=torch.float64)
    assert _fit(lambda p: p[:1] - 1.0, start).tolist() == pytest.approx([1.0, 0.5], abs=1e-3)
    assert _fit(lambda p: p[:1] - 9.0, start, reach=2.0).tolist() == pytest.approx([2.0, 0.5])

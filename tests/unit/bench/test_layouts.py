"""What `python -m benchmarks.layouts` measures for each number of ranks, and where it writes."""

from __future__ import annotations

import pytest

from bdlora_megatron.bench.plan import BenchPlan
from bdlora_megatron.cli.bench import _plan
from bdlora_megatron.cli.main import _parser
from benchmarks.layouts import RESULTS, arguments


def _asked(given):
    return _parser().parse_args(arguments(given))


def test_two_ranks_keep_every_default():
    asked = _asked(["--repeats", "3"])
    assert asked.out == RESULTS / "layouts"
    assert _plan(asked) == BenchPlan(repeats=3)


@pytest.mark.parametrize("tp", [3, 4])
def test_more_ranks_have_a_report_of_their_own(tp):
    asked = _asked(["--tp", str(tp)])
    assert asked.out == RESULTS / f"layouts-tp{tp}"
    plan = _plan(asked)
    assert plan.tp == tp
    assert len(plan.settings()) == 2 * (2 + 2 + 1 + 1)
    assert _asked(["--tp", str(tp), "--out", "elsewhere"]).out.name == "elsewhere"

"""The lowest validation loss, and when waiting for a lower one ends a run."""

from __future__ import annotations

import pytest

from bdlora_megatron.train.best import Best
from bdlora_megatron.train.schema import TrainSection


def _fed(losses, **settings):
    """Every evaluation taken in, two steps apart, until one ends the run."""
    section = TrainSection(train_iters=100, **settings)
    best = Best()
    for number, loss in enumerate(losses, 1):
        best.note(2 * number, loss, section)
        # As a run that is stopped and goes on after each.
        best = Best.of_checkpoint(best.facts())
        if best.why_stop(section):
            return best, 2 * number, best.why_stop(section)
    return best, 2 * len(losses), None


@pytest.mark.parametrize(
    ("losses", "settings", "best", "ended"),
    [
        ([3.0, 2.0, 2.5, 2.4, 1.0], {}, (1.0, 10), None),
        ([3.0, 2.0, 2.5, 2.4, 1.0], {"early_stopping_patience": 2}, (2.0, 4), 8),
        ([3.0, 2.0, 2.5, 1.9, 2.0], {"early_stopping_patience": 2}, (1.9, 8), None),
        # Small gains are kept as the best and do not count, until they add up.
        (
            [3.0, 2.95, 2.91, 2.87, 2.84],
            {"early_stopping_patience": 3, "early_stopping_min_delta": 0.1},
            (2.84, 10),
            None,
        ),
        (
            [3.0, 2.95, 2.91, 2.9, 2.0],
            {"early_stopping_patience": 3, "early_stopping_min_delta": 0.1},
            (2.9, 8),
            8,
        ),
        ([2.0, 2.0], {"early_stopping_patience": 1}, (2.0, 2), 4),
        ([float("nan"), float("inf")], {"early_stopping_patience": 2}, (None, 0), 4),
    ],
)
def test_the_lowest_loss_and_the_end(losses, settings, best, ended):
    found, step, why = _fed(losses, **settings)
    assert (found.loss, found.step) == best
    assert (step if why else None) == ended


def test_a_step_counts_once_and_the_reason_names_what_was_missed():
    settings = {"early_stopping_patience": 2, "early_stopping_min_delta": 0.25}
    found, step, why = _fed([2.0, 1.9, 1.8], **settings)
    assert why == (
        "no validation loss below 1.7500 in 2 evaluations since step 2 "
        "(train.early_stopping_patience)"
    )
    before = found.facts()
    found.note(step, 0.5, TrainSection(train_iters=9, **settings))
    assert found.facts() == before
    assert Best.of_checkpoint({"settings": {}}) == Best()

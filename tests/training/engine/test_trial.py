from __future__ import annotations

import pytest

from pipeline.training.engine.trial import trial_rows


@pytest.mark.parametrize(
    ("window", "chosen"),
    [
        (None, [3, 1]),
        (100, [3, 1]),  # no row is longer
        (8, [3, 2]),  # the shortest that is
        (4, [3, 1]),  # one of the short ones is, already
    ],
)
def test_a_trial_is_short_but_for_a_row_beyond_the_window(window: int | None, chosen: list[int]) -> None:
    assert trial_rows([30, 5, 9, 3], 2, window) == chosen


def test_there_may_be_fewer_rows() -> None:
    assert trial_rows([7], 4, 3) == [0]

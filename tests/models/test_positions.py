from __future__ import annotations

import numpy as np
import pytest

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.models.positions import ImageSpan, find_image_spans, mrope_positions


def test_text_alone_counts_up():
    position_ids, rope_delta = mrope_positions(4, [])
    np.testing.assert_array_equal(position_ids, [[0, 1, 2, 3]] * 3)
    assert rope_delta == 0


def test_two_images_between_text():
    position_ids, rope_delta = mrope_positions(13, [ImageSpan(2, 2, 3), ImageSpan(9, 1, 2)])
    #            text  image 2x3          text  1x2    text
    time = [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 8, 9]
    rows = [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6, 8, 9]
    columns = [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(position_ids, [time, rows, columns])
    assert position_ids.dtype == np.int32
    assert rope_delta == 10 - 13


def test_sequence_may_end_with_an_image():
    position_ids, rope_delta = mrope_positions(5, [ImageSpan(1, 1, 4)])
    np.testing.assert_array_equal(position_ids[2], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(position_ids[0], [0, 1, 1, 1, 1])
    assert 5 + rope_delta == 5


@pytest.mark.parametrize("spans", [[(3, 2, 2), (5, 1, 1)], [(8, 1, 3)], [(5, 1, 1), (2, 1, 1)], [(1, 0, 4)]])
def test_spans_must_lie_in_order_within_the_sequence(spans):
    with pytest.raises(SpaceDriveError, match="image span"):
        mrope_positions(10, [ImageSpan(*span) for span in spans])


def test_runs_are_found_by_id():
    token_ids = np.array([9, 9, 1, 9, 9, 9, 9, 2, 9])
    spans = find_image_spans(token_ids, [(1, 2), (2, 2), (1, 1)], 9)
    assert spans == [ImageSpan(0, 1, 2), ImageSpan(3, 2, 2), ImageSpan(8, 1, 1)]
    assert [span.stop for span in spans] == [2, 7, 9]


@pytest.mark.parametrize("grids", [[(1, 2)], [(1, 2), (1, 3)], [(1, 2), (2, 2), (1, 1), (1, 1)]])
def test_runs_must_fit_the_images(grids):
    with pytest.raises(SpaceDriveError, match="runs of"):
        find_image_spans(np.array([9, 9, 1, 9, 9, 9, 9, 2, 9]), grids, 9)

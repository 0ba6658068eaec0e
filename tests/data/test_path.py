"""The future path, metre by metre."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spacedrive_jax.data.route import future_path


def arc(radius, step, count=6):
    """Poses along a circle to the left, `step` metres apart."""
    angles = np.arange(1, count + 1) * step / radius
    return np.stack([radius * np.sin(angles), radius * (1 - np.cos(angles))], axis=1), angles


def test_straight_on():
    waypoints = np.stack([np.arange(1, 7) * 4.0, np.zeros(6)], axis=1)
    path = future_path(waypoints, np.zeros(6), 20)
    np.testing.assert_allclose(path.points, np.stack([np.arange(1, 21), np.zeros(20)], axis=1), atol=1e-5)
    assert path.mask.all()
    assert path.points.dtype == np.float32


def test_a_bend_is_not_cut_short():
    """Five metres between poses on a circle of 12 m: chords would be 0.26 m off."""
    path = future_path(*arc(12.0, 5.0), 20)
    np.testing.assert_allclose(np.linalg.norm(path.points - [0, 12], axis=1), 12, atol=0.01)
    angles = np.arange(1, 21) / 12
    np.testing.assert_allclose(
        path.points, 12 * np.stack([np.sin(angles), 1 - np.cos(angles)], axis=1), atol=0.03
    )


def test_a_short_future_is_masked_and_goes_straight_on():
    path = future_path(*arc(10.0, 1.2), 20)
    np.testing.assert_array_equal(path.mask, np.arange(1, 21) <= 7.2)
    direction = np.array([np.cos(0.72), np.sin(0.72)])
    np.testing.assert_allclose(np.diff(path.points[7:], axis=0), [direction] * 12, atol=1e-5)


def test_standing_has_no_path():
    jitter = np.random.default_rng(0).normal(0, 0.005, (6, 2))
    path = future_path(jitter, np.full(6, 2.0), 20)
    assert not path.mask.any()
    np.testing.assert_allclose(path.points[:, 1], 0, atol=1e-6)


def test_stopping_on_the_way_keeps_what_was_driven():
    waypoints = np.array([[2.0, 0], [4, 0], [4.01, 0], [4.01, 0.01], [4.02, 0], [4.02, 0]])
    path = future_path(waypoints, np.zeros(6), 6)
    np.testing.assert_array_equal(path.mask, [1, 1, 1, 1, 0, 0])


def test_backwards():
    waypoints = np.stack([-np.arange(1, 7) * 1.5, np.zeros(6)], axis=1)
    path = future_path(waypoints, np.zeros(6), 10)
    np.testing.assert_allclose(path.points[:, 0], -np.arange(1, 11), atol=1e-4)
    np.testing.assert_array_equal(path.mask, np.arange(1, 11) <= 9)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.3, 6), st.floats(8, 200))
def test_points_are_a_metre_apart_and_left_is_right_mirrored(step, radius):
    path = future_path(*arc(radius, step), 20)
    lengths = np.linalg.norm(np.diff(np.vstack([[0, 0], path.points]), axis=0), axis=1)
    assert (lengths <= 1 + 1e-4).all()
    assert (lengths > 0.97).all()
    mirrored, yaw = arc(radius, step)
    other = future_path(mirrored * [1, -1], -yaw, 20)
    np.testing.assert_allclose(other.points * [1, -1], path.points, atol=1e-4)
    np.testing.assert_array_equal(other.mask, path.mask)

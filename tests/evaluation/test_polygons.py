"""The corrected protocol's geometry: by hand, and by what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spacedrive_jax.evaluation.collision import (
    MaskArea,
    Obstacles,
    PolygonArea,
    box_corners,
    drivable_area,
    ego_boxes,
    leaves_road,
    overlaps,
)
from spacedrive_jax.evaluation.metrics import StepScores, horizon_scores, score_steps, summarize
from spacedrive_jax.evaluation.protocols import CORRECTED, PolygonRule
from tests.record_factory import make_record

RULE = PolygonRule(ego_offset=1.4)
numbers = st.floats(-45, 45, width=32)
paths = arrays(np.float64, (2, 6, 2), elements=numbers)
agents = arrays(np.float64, (3, 6, 3), elements=st.floats(-30, 30, width=32))


def scene(centre_and_yaw: np.ndarray, length: float = 4.5, width: float = 1.9) -> Obstacles:
    count = len(centre_and_yaw)
    return Obstacles(
        centre=centre_and_yaw[..., :2],
        yaw=centre_and_yaw[..., 2],
        size=np.tile([length, width], (count, 1)),
        mask=np.ones((count, 6), bool),
    )


def ahead(step: float) -> np.ndarray:
    return np.stack([step * np.arange(1, 7), np.zeros(6)], axis=1)[None]


def parked(x: float, y: float = 0.0) -> Obstacles:
    return scene(np.tile([x, y, 0.0], (1, 6, 1)))


def test_box_is_where_the_vehicle_is() -> None:
    """The ego pose is the rear axle: 0.64 m of the vehicle lie behind it, 3.44 m before it."""
    centre, boxes = ego_boxes(ahead(2.0), RULE)
    np.testing.assert_allclose(centre[0, :, 0], 2.0 * np.arange(7) + 1.4)
    np.testing.assert_allclose(boxes[0, 0].min(axis=0), [-0.642, -0.925])
    np.testing.assert_allclose(boxes[0, 0].max(axis=0), [3.442, 0.925])


def test_heading_is_carried_over() -> None:
    """Turning left, then stopping: the box stays turned. The published collision test turns it back."""
    path = np.array([[[0.0, 2.0], [0.0, 4.0], [0.0, 4.1], [0.0, 4.1], [0.0, 4.1], [0.0, 4.1]]])
    centre, _ = ego_boxes(path, RULE)
    np.testing.assert_allclose(centre[0, 1:], path[0] + [0.0, 1.4], atol=1e-12)


def test_collision_begins_at_contact() -> None:
    """A parked car's rear at 10 - 2.25 = 7.75 m: met once the waypoint is past 7.75 - 3.442 = 4.308 m."""
    path = np.stack([np.array([1.0, 2.0, 3.0, 4.0, 4.3, 4.32]), np.zeros(6)], axis=1)[None]
    assert overlaps(path, parked(10), RULE).tolist() == [[False] * 5 + [True]]
    assert not overlaps(path, parked(10, 1.9), RULE).any()
    assert overlaps(path, parked(10, 1.87), RULE)[0, 5]


def test_only_annotated_steps_collide() -> None:
    car = parked(6)
    mask = np.array([[True, False, True, False, True, False]])
    hits = overlaps(ahead(0.0), Obstacles(car.centre, car.yaw, car.size, mask), RULE)
    assert not hits.any()
    hits = overlaps(ahead(1.0), Obstacles(car.centre, car.yaw, car.size, mask), RULE)
    assert hits.tolist() == [[True, False, True, False, True, False]]


@pytest.mark.parametrize("kind", ["polygons", "mask"])
def test_road_ends_where_it_ends(kind: str) -> None:
    """A road 12 m wide: the 1.85 m wide box leaves it between 5.07 and 5.08 m to the side."""
    rng = np.random.default_rng(0)
    road = shapely.to_wkb(shapely.box(-50, -6, 50, 6))
    record = make_record(rng, drivable_polygons=[road] if kind == "polygons" else [])
    area = drivable_area(record)
    assert isinstance(area, PolygonArea if kind == "polygons" else MaskArea)
    side = np.array([4.0, 5.0, 5.05, 5.2, 6.0, 8.0])
    boxes = box_corners(np.stack([np.zeros(6), side], axis=1), np.zeros(6), np.array([4.084, 1.85]))
    expected = 4.084 * np.clip(side + 0.925 - 6, 0, 1.85)
    np.testing.assert_allclose(area.outside(boxes), expected, atol=1e-9 if kind == "polygons" else 0.45)
    assert (area.outside(boxes) > 0).tolist() == [False, False, False, True, True, True]
    assert not leaves_road(ahead(4.0), area, RULE).any()


def test_beyond_the_map_square_nothing_is_known() -> None:
    nowhere = PolygonArea(shapely.Polygon())
    empty = MaskArea(np.zeros((1000, 1000), np.uint8))
    for area in (nowhere, empty):
        assert leaves_road(ahead(1.0), area, RULE).all()
        far = np.full((1, 6, 2), 1e9)
        assert leaves_road(far, area, RULE).tolist() == [[True] + [False] * 6]


def test_no_map() -> None:
    assert drivable_area(make_record(np.random.default_rng(0), drivable_source="none")) is None


def test_gaps_between_polygons_are_no_edge() -> None:
    halves = [shapely.box(-50, -6, 2, 6), shapely.box(2.001, -6, 50, 6)]
    polygons = [shapely.to_wkb(half) for half in halves]
    record = make_record(np.random.default_rng(0), drivable_polygons=polygons)
    assert not leaves_road(ahead(1.0), drivable_area(record), RULE).any()


def rotate(points: np.ndarray, angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return points @ np.array([[cosine, sine], [-sine, cosine]])


poses = st.tuples(st.floats(-500, 500), st.floats(-500, 500), st.floats(-3, 3)).map(np.array)


def to_world(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    return rotate(points, pose[2]) + pose[:2]


def to_ego(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    return rotate(points - pose[:2], -pose[2])


def touching(corners: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Which ego boxes touch an agent by less than rounding: neither apart nor overlapping."""
    ego = shapely.polygons(corners)[:, None]
    other = shapely.polygons(box_corners(boxes[..., :2], boxes[..., 2], np.array([4.5, 1.9])))[None]
    apart = shapely.distance(ego, other) > 1e-6
    return ~(apart | (shapely.area(shapely.intersection(ego, other)) > 1e-6))


@settings(max_examples=60, deadline=None)
@given(trajectories=paths, boxes=agents, pose=poses, motion=poses)
def test_rigid_motion_of_the_world_changes_nothing(trajectories, boxes, pose, motion) -> None:
    """Drive, agents and road moved together in the world and seen from the moved ego pose score the same."""
    moved_pose = np.append(to_world(pose[:2], motion), pose[2] + motion[2])
    road = np.array([[-20.0, -6.0], [20.0, -6.0], [20.0, 6.0], [-20.0, 6.0]])

    def seen(points: np.ndarray) -> np.ndarray:
        return to_ego(to_world(to_world(points, pose), motion), moved_pose)

    again = scene(np.concatenate([seen(boxes[..., :2]), boxes[..., 2:]], axis=-1))
    corners = ego_boxes(trajectories, RULE)[1]
    # A mere touch may be decided by rounding, so those steps are left out.
    clear = ~touching(corners[:, 1:], boxes).any(axis=1)
    before, after = overlaps(trajectories, scene(boxes), RULE), overlaps(seen(trajectories), again, RULE)
    np.testing.assert_array_equal(after[clear], before[clear])
    flat = corners.reshape(-1, 4, 2)
    area, moved = PolygonArea(shapely.Polygon(road)), PolygonArea(shapely.Polygon(seen(road)))
    np.testing.assert_allclose(moved.outside(seen(flat)), area.outside(flat), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(trajectories=paths, angle=st.floats(-3, 3))
def test_boxes_turn_with_the_path(trajectories, angle) -> None:
    """Steps of 0.5 m and more carry their own heading."""
    steps = np.diff(trajectories, axis=1, prepend=0.0)
    trajectories = trajectories[(np.linalg.norm(steps, axis=-1) > 0.5).all(axis=1)]
    before = ego_boxes(trajectories, RULE)[1][:, 1:]
    np.testing.assert_allclose(
        ego_boxes(rotate(trajectories, angle), RULE)[1][:, 1:], rotate(before, angle), atol=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(trajectories=paths, boxes=agents, growth=st.floats(0, 3))
def test_larger_agents_are_hit_no_less(trajectories, boxes, growth) -> None:
    small = overlaps(trajectories, scene(boxes), RULE)
    large = overlaps(trajectories, scene(boxes, 4.5 + growth, 1.9 + growth), RULE)
    assert (large | ~small).all()


@settings(max_examples=60, deadline=None)
@given(trajectories=paths, boxes=agents, order=st.permutations(range(3)))
def test_order_of_agents_does_not_matter(trajectories, boxes, order) -> None:
    np.testing.assert_array_equal(
        overlaps(trajectories, scene(boxes), RULE), overlaps(trajectories, scene(boxes[order]), RULE)
    )


@settings(max_examples=60, deadline=None)
@given(trajectories=paths, boxes=agents, steps=st.integers(1, 5))
def test_later_steps_do_not_change_earlier_ones(trajectories, boxes, steps) -> None:
    whole = score_steps(trajectories, trajectories[0], scene(boxes), None, RULE)
    cut = boxes[:, :steps]
    obstacles = Obstacles(cut[..., :2], cut[..., 2], np.tile([4.5, 1.9], (3, 1)), np.ones((3, steps), bool))
    short = score_steps(trajectories[:, :steps], trajectories[0, :steps], obstacles, None, RULE)
    np.testing.assert_array_equal(short.collision, whole.collision[:, :steps])
    np.testing.assert_array_equal(short.l2, whole.l2[:, :steps])


def one_sample(**changes: np.ndarray) -> StepScores:
    fields = {
        "l2": np.array([[1.0, 2, 3, 4, 5, 6]]),
        "collision": np.array([[False, True, False, True, False, False]]),
        "recorded_collision": np.zeros((1, 6), bool),
        "off_road": np.zeros((1, 7), bool),
        "has_map": np.ones(1, bool),
    }
    return StepScores(**{**fields, **changes})


def test_horizons_stand_for_themselves() -> None:
    horizons = horizon_scores(one_sample(), CORRECTED)
    assert horizons.l2.tolist() == [[2, 4, 6]]
    assert horizons.collision.tolist() == [[1, 1, 0]]


def test_what_cannot_be_judged_is_left_out() -> None:
    touching = np.array([[False, True, False, False, False, False]])
    horizons = horizon_scores(one_sample(recorded_collision=touching), CORRECTED)
    assert np.isnan(horizons.collision[0, 0])
    assert summarize(horizons)["collision"] == {"1s": None, "2s": 100.0, "3s": 0.0, "avg": None}
    beside_the_road = np.ones((1, 7), bool)
    assert np.isnan(horizon_scores(one_sample(off_road=beside_the_road), CORRECTED).intersection).all()


def test_failures_collide_and_leave_the_road() -> None:
    failed = np.ones(1, bool)
    horizons = horizon_scores(one_sample(), CORRECTED, failed=failed)
    assert horizons.collision.tolist() == horizons.intersection.tolist() == [[1, 1, 1]]
    without_map = horizon_scores(one_sample(has_map=np.zeros(1, bool)), CORRECTED, failed=failed)
    assert np.isnan(without_map.intersection).all()

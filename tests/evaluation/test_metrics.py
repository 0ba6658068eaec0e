from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.evaluation.collision import (
    Grid,
    Obstacles,
    box_cells,
    box_corners,
    collides,
    draw_polygon,
    ego_cells,
    off_road_cells,
    rasterize_polygons,
    step_headings,
    to_cells,
)
from spacedrive_jax.evaluation.metrics import StepScores, horizon_scores, summarize
from spacedrive_jax.evaluation.protocols import OMNIDRIVE, PROTOCOLS, UNIAD, VAD, StepRule, protocol_named

RULES = [OMNIDRIVE.steps, UNIAD.steps]
paths = arrays(np.float64, (1, 6, 2), elements=st.floats(-80, 80, width=32))


def parked(x: float, y: float, yaw: float = 0.0) -> Obstacles:
    return Obstacles(
        centre=np.tile([x, y], (1, 6, 1)).astype(float),
        yaw=np.full((1, 6), yaw),
        size=np.array([[4.5, 1.9]]),
        mask=np.ones((1, 6), bool),
    )


def step_scores(**changes: np.ndarray) -> StepScores:
    fields = {
        "l2": np.zeros((1, 6)),
        "collision": np.zeros((1, 6), bool),
        "recorded_collision": np.zeros((1, 6), bool),
        "off_road": np.zeros((1, 7), bool),
        "has_map": np.ones(1, bool),
    }
    return StepScores(**{**fields, **changes})


@pytest.mark.parametrize(
    ("resolution", "centre", "yaw", "size", "cells", "x", "y"),
    [
        (0.1, (0.0, 0.0), 0.0, (4.08, 1.85), 779, (480, 520), (491, 509)),
        (0.5, (0.0, 0.0), 0.0, (4.08, 1.85), 45, (96, 104), (98, 102)),
        # 907 with the pinned OpenCV 4.10; 4.12 and later fill one border cell less.
        (0.1, (10.0, 3.0), 0.3, (4.5, 1.9), 907, (576, 624), (514, 546)),
    ],
)
def test_box_raster(resolution, centre, yaw, size, cells, x, y) -> None:
    grid = Grid(resolution)
    raster = grid.empty()
    draw_polygon(raster, to_cells(box_corners(np.array(centre), np.array(yaw), np.array(size)), grid))
    rows, columns = np.nonzero(raster)
    assert raster.sum() == cells
    assert (columns.min(), columns.max()) == x
    assert (rows.min(), rows.max()) == y


@pytest.mark.parametrize(
    ("rule", "cells", "x", "y"),
    [(OMNIDRIVE.steps, 720, (480, 519), (491, 508)), (VAD.steps, 32, (97, 104), (98, 101))],
    ids=["0.1 m", "0.5 m"],
)
def test_ego_cells(rule: StepRule, cells: int, x: tuple[int, int], y: tuple[int, int]) -> None:
    covered = ego_cells(rule)
    assert len(covered) == cells
    assert (covered[:, 0].min(), covered[:, 0].max()) == x
    assert (covered[:, 1].min(), covered[:, 1].max()) == y


def test_hand_made_collision() -> None:
    """Driving at 2 m a step towards a car parked 10 m ahead: 10 - 2.25 - 2.04 = 5.7 m of room."""
    waypoints = np.stack([2.0 * np.arange(1, 7), np.zeros(6)], axis=1)[None]
    hits = collides(waypoints, parked(10, 0), OMNIDRIVE.steps)
    assert hits.tolist() == [[False, False, True, True, True, True]]
    assert not collides(waypoints, parked(10, 3), OMNIDRIVE.steps).any()


def test_masked_agents_are_not_there() -> None:
    waypoints = np.stack([2.0 * np.arange(1, 7), np.zeros(6)], axis=1)[None]
    car = parked(10, 0)
    mask = np.array([[True, True, True, False, True, False]])
    hits = collides(waypoints, Obstacles(car.centre, car.yaw, car.size, mask), OMNIDRIVE.steps)
    assert hits.tolist() == [[False, False, True, False, True, False]]


def test_overlapping_agents_do_not_cancel() -> None:
    one = parked(10, 0)
    two = Obstacles(*(np.concatenate([getattr(one, name)] * 2) for name in ("centre", "yaw", "size", "mask")))
    waypoints = np.full((1, 6, 2), [10.0, 0.0])
    assert collides(waypoints, two, OMNIDRIVE.steps).all()


def test_short_steps_are_tested_unrotated() -> None:
    """Quirk Q3: 0.9 m sideways keeps heading 0, 1.1 m sideways turns the box."""
    for rule in RULES:
        headings = [step_headings(np.full((1, 1, 2), [0.0, y]))[0] for y in (0.9, 1.1)]
        reach = [np.ptp(box_cells(np.zeros((1, 2)), heading, rule)[0], axis=0) for heading in headings]
        assert reach[0][0] > reach[0][1]
        assert reach[1][0] < reach[1][1]


def test_outside_the_grid_is_tested_at_the_border() -> None:
    waypoints = np.full((1, 6, 2), [90.0, 0.0])
    assert collides(waypoints, parked(49.9, 0), OMNIDRIVE.steps).all()
    assert off_road_cells(waypoints, np.zeros((1000, 1000), np.uint8), OMNIDRIVE.steps)[0, 1:].sum() == 0


@settings(max_examples=40, deadline=None)
@given(trajectory=paths, x=st.floats(-49, 49), y=st.floats(-49, 49), yaw=st.floats(-3, 3))
def test_culling_agents_changes_nothing(trajectory, x, y, yaw) -> None:
    obstacles = parked(x, y, yaw)
    for rule in RULES:
        grid = Grid(rule.resolution)
        corners = box_corners(obstacles.centre, obstacles.yaw, obstacles.size[:, None])
        raster = grid.empty()
        draw_polygon(raster, to_cells(corners, grid)[0, 0])
        cells = box_cells(trajectory[0], step_headings(trajectory)[0], rule)
        expected = [raster[step[:, 1], step[:, 0]].any() for step in cells]
        assert collides(trajectory, obstacles, rule)[0].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(trajectory=paths)
def test_off_road_and_on_road_cells_fill_the_footprint(trajectory) -> None:
    for rule in RULES:
        grid = Grid(rule.resolution)
        checkered = (np.indices((grid.cells, grid.cells)).sum(axis=0) % 2).astype(np.uint8)
        whole = off_road_cells(trajectory, grid.empty(), rule)
        halves = [off_road_cells(trajectory, half, rule) for half in (checkered, 1 - checkered)]
        np.testing.assert_array_equal(sum(halves), whole)


def test_far_predictions_score_without_overflow() -> None:
    waypoints = np.full((1, 6, 2), 1e12)
    for rule in RULES:
        assert not collides(waypoints, parked(0, 0), rule).any()
        assert off_road_cells(waypoints, Grid(rule.resolution).empty(), rule)[0, 1:].sum() == 0


def test_drivable_raster_of_the_wrong_size() -> None:
    with pytest.raises(ValueError, match=r"0\.1 m grid"):
        off_road_cells(np.zeros((1, 6, 2)), np.zeros((200, 200), np.uint8), OMNIDRIVE.steps)


def test_l2_rules() -> None:
    scores = step_scores(l2=np.array([[1.0, 2, 3, 4, 5, 6]]))
    assert horizon_scores(scores, OMNIDRIVE).l2.tolist() == [[1.5, 2.5, 3.5]]
    assert horizon_scores(scores, VAD).l2.tolist() == [[1.5, 2.5, 3.5]]
    assert horizon_scores(scores, UNIAD).l2.tolist() == [[2, 4, 6]]


def test_collision_rules_and_exclusion() -> None:
    scores = step_scores(
        collision=np.array([[True, False, True, True, False, False]]),
        recorded_collision=np.array([[True, False, False, False, False, False]]),
    )
    assert horizon_scores(scores, OMNIDRIVE).collision.tolist() == [[0, 1, 1]]
    assert horizon_scores(scores, VAD).collision[0] == pytest.approx([0, 2 / 4, 2 / 6])
    assert horizon_scores(scores, OMNIDRIVE, exclude=False).collision.tolist() == [[1, 1, 1]]


def test_intersection_needs_a_clean_start() -> None:
    leaves = np.array([[False, False, False, True, False, False, False]])
    assert horizon_scores(step_scores(off_road=leaves), OMNIDRIVE).intersection.tolist() == [[0, 1, 1]]
    assert horizon_scores(step_scores(off_road=leaves), VAD).intersection[0] == pytest.approx(
        [0, 1 / 4, 1 / 6]
    )
    starts_outside = leaves.copy()
    starts_outside[0, 0] = True
    assert horizon_scores(step_scores(off_road=starts_outside), OMNIDRIVE).intersection.tolist() == [
        [0, 0, 0]
    ]


def test_no_map_is_not_zero() -> None:
    summary = summarize(horizon_scores(step_scores(has_map=np.zeros(1, bool)), OMNIDRIVE))
    assert summary["intersection"] == {"1s": None, "2s": None, "3s": None, "avg": None}
    assert summary["collision"]["avg"] == 0.0


def test_devkit_polygons_refill_holes() -> None:
    """A hole is empty unless a later polygon covers it, as in the devkit."""
    import shapely

    hole = [(0, 0), (20, 0), (20, 20), (0, 20)]
    ring = shapely.Polygon([(-40, -40), (40, -40), (40, 40), (-40, 40)], [hole])
    grid = Grid(0.5)
    with_hole = rasterize_polygons(np.array([ring]), grid)
    assert with_hole[120, 120] == 0
    assert with_hole[90, 120] == 1
    assert rasterize_polygons(np.array([ring, shapely.Polygon(hole)]), grid)[120, 120] == 1
    assert rasterize_polygons(np.array([shapely.Polygon(hole), ring]), grid)[120, 120] == 0


def test_protocol_names() -> None:
    assert list(PROTOCOLS) == ["omnidrive", "vad", "uniad", "corrected"]
    assert protocol_named("vad") is VAD
    with pytest.raises(SpaceDriveError, match="omnidrive, vad, uniad, corrected"):
        protocol_named("stp3")

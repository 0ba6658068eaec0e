"""Scores against the published scripts' own, sample by sample (64 scenes, three protocols)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from spacedrive_jax.evaluation.collision import Obstacles, collides
from spacedrive_jax.evaluation.drivable import off_road_cells, tangent_yaw
from spacedrive_jax.evaluation.metrics import horizon_scores, score_steps, stack_scores, summarize
from spacedrive_jax.evaluation.protocols import OMNIDRIVE, UNIAD, VAD, Protocol
from spacedrive_jax.evaluation.rasters import Grid, box_corners, draw_polygon, to_cells

PUBLISHED_NAMES = {"omnidrive": "ours", "vad": "vad", "uniad": "uniad"}
VEHICLE_INDICES = np.arange(8, 18)
"""Positions of the ten vehicle categories in the published category table."""


class Case:
    """The golden scenes; `outputs` keys start with the published protocol name."""

    def __init__(self, folder: Path) -> None:
        self.inputs = dict(np.load(folder / "inputs.npz"))
        self.outputs = dict(np.load(folder / "outputs.npz"))
        self.config = json.loads((folder / "config.json").read_text())
        self.tokens: list[str] = self.config["tokens"]

    def prediction(self, token: str) -> np.ndarray | None:
        """The first six predicted waypoints; None where there is no or too short a prediction."""
        waypoints = self.inputs.get(f"{token}/pred")
        return None if waypoints is None or len(waypoints) < 6 else waypoints[:6]

    def reference(self, token: str) -> np.ndarray:
        return self.inputs[f"{token}/gt_planning"][0, :, :2]

    def whole_future(self, token: str) -> bool:
        return bool(self.inputs[f"{token}/gt_planning_mask"].all())

    def obstacles(self, token: str) -> Obstacles:
        def value(name: str) -> np.ndarray:
            return self.inputs[f"{token}/{name}"]

        vehicle = np.isin(value("gt_fut_idx")[:, 0], VEHICLE_INDICES)
        boxes = value("gt_boxes")[vehicle]
        return Obstacles(
            centre=boxes[:, None, :2] + value("gt_fut_traj")[vehicle, :6].cumsum(axis=1),
            yaw=boxes[:, 6:7] + value("gt_fut_yaw")[vehicle, :6].cumsum(axis=1),
            size=boxes[:, 3:5],
            mask=value("gt_fut_traj_mask")[vehicle, :6] == 1,
        )

    def drivable(self, token: str, protocol: Protocol) -> np.ndarray:
        cells = Grid(protocol.steps.resolution).cells
        packed = self.inputs[f"{token}/drivable_{cells}_packbits"]
        return np.unpackbits(packed)[: cells * cells].reshape(cells, cells)

    def raw(self, protocol: Protocol, token: str, name: str) -> np.ndarray:
        return self.outputs[f"{PUBLISHED_NAMES[protocol.name]}/raw/{token}/{name}"]

    def scored(self) -> list[str]:
        return [token for token in self.tokens if self.prediction(token) is not None]


@pytest.fixture(scope="module")
def case(golden: Path) -> Case:
    return Case(golden / "metrics")


@pytest.fixture(params=[OMNIDRIVE, VAD, UNIAD], ids=lambda protocol: protocol.name)
def protocol(request: pytest.FixtureRequest) -> Protocol:
    return request.param


def test_collisions_per_step(case: Case, protocol: Protocol) -> None:
    for token in case.scored():
        both = np.stack([case.prediction(token), case.reference(token)])
        predicted, reference = collides(both, case.obstacles(token), protocol.steps)
        np.testing.assert_array_equal(reference, case.raw(protocol, token, "gt_box_coll"), token)
        np.testing.assert_array_equal(predicted & ~reference, case.raw(protocol, token, "box_coll"), token)


def test_off_road_cells_per_step(case: Case, protocol: Protocol) -> None:
    for token in case.scored():
        cells = off_road_cells(case.prediction(token)[None], case.drivable(token, protocol), protocol.steps)
        np.testing.assert_array_equal(cells[0], case.raw(protocol, token, "offroad_cells"), token)


def test_footprint_areas_and_headings(case: Case, protocol: Protocol) -> None:
    """With nothing drivable, every cell of the footprint is off the road."""
    grid = Grid(protocol.steps.resolution)
    for token in case.scored():
        waypoints = case.prediction(token)[None]
        area = off_road_cells(waypoints, grid.empty(), protocol.steps)[0]
        np.testing.assert_array_equal(area, case.raw(protocol, token, "ego_seg_area"), token)
        if protocol is OMNIDRIVE:
            expected = case.raw(protocol, token, "pred_yaw")
            np.testing.assert_allclose(tangent_yaw(waypoints)[0], expected, atol=1e-9)


def test_agent_areas(case: Case, protocol: Protocol) -> None:
    grid = Grid(protocol.steps.resolution)
    for token in case.scored():
        obstacles = case.obstacles(token)
        polygons = to_cells(box_corners(obstacles.centre, obstacles.yaw, obstacles.size[:, None]), grid)
        for step, expected in enumerate(case.raw(protocol, token, "agent_seg_area")[1:]):
            raster = grid.empty()
            for vertices in polygons[obstacles.mask[:, step], step]:
                draw_polygon(raster, vertices)
            assert raster.sum() == expected, (token, step)


@pytest.mark.parametrize("protocol", [OMNIDRIVE, VAD], ids=["0.1 m", "0.5 m"])
def test_agent_mask_cell_for_cell(case: Case, protocol: Protocol) -> None:
    grid = Grid(protocol.steps.resolution)
    obstacles = case.obstacles("tok001")
    polygons = to_cells(box_corners(obstacles.centre, obstacles.yaw, obstacles.size[:, None]), grid)
    shape = (7, grid.cells, grid.cells)
    expected = np.unpackbits(case.raw(protocol, "tok001", "agent_seg_packbits"))[: np.prod(shape)]
    for step, mask in enumerate(expected.reshape(shape)[1:]):
        raster = grid.empty()
        for vertices in polygons[obstacles.mask[:, step], step]:
            draw_polygon(raster, vertices)
        np.testing.assert_array_equal(raster, mask)


def _score(case: Case, protocol: Protocol) -> tuple[list[str], dict[str, np.ndarray]]:
    tokens = [token for token in case.scored() if case.whole_future(token)]
    scores = stack_scores(
        [
            score_steps(
                case.prediction(token)[None],
                case.reference(token),
                case.obstacles(token),
                case.drivable(token, protocol),
                protocol.steps,
            )
            for token in tokens
        ]
    )
    horizons = horizon_scores(scores, protocol)
    return tokens, {
        "l2": horizons.l2,
        "plan_obj_box_col": horizons.collision,
        "plan_boundary": horizons.intersection,
        "summary": summarize(horizons),
    }


@pytest.mark.parametrize("protocol", [OMNIDRIVE, UNIAD], ids=["omnidrive", "uniad"])
def test_samples_and_aggregates(case: Case, protocol: Protocol) -> None:
    published = PUBLISHED_NAMES[protocol.name]
    tokens, values = _score(case, protocol)
    rows = [case.tokens.index(token) for token in tokens]
    counted = case.outputs[f"{published}/per_sample_single_call/samples"]
    assert set(np.flatnonzero(counted)) == set(rows)
    aggregate = case.config[f"{published}/aggregate_threads1"]
    assert aggregate["samples"] == len(tokens)
    summary = {
        "l2": values["summary"]["l2"],
        "plan_obj_box_col": values["summary"]["collision"],
        "plan_boundary": values["summary"]["intersection"],
    }
    for name in ("l2", "plan_obj_box_col", "plan_boundary"):
        for column, horizon in enumerate(("1s", "2s", "3s")):
            expected = case.outputs[f"{published}/per_sample_single_call/{name}_{horizon}"][rows]
            np.testing.assert_allclose(values[name][:, column], expected, atol=1e-6, err_msg=name)
            assert summary[name][horizon] == pytest.approx(aggregate[f"{name}_{horizon}"], abs=1e-6)


def test_clean_vad(case: Case) -> None:
    """The published VAD script loses terms to two bugs; its per-step pieces do not."""
    tokens, values = _score(case, VAD)
    for row, token in enumerate(tokens):
        hits = case.raw(VAD, token, "box_coll")
        off_road = case.raw(VAD, token, "offroad_cells") > 0
        for column, steps in enumerate((2, 4, 6)):
            assert values["plan_obj_box_col"][row, column] == pytest.approx(hits[:steps].mean())
            boundary = 0.0 if off_road[0] else off_road[1 : steps + 1].mean()
            assert values["plan_boundary"][row, column] == pytest.approx(boundary)
    # L2 is right in the published script up to the first exception: its 1 s figure has lost nothing.
    expected = case.config["vad/aggregate_threads1"]["l2_1s"]
    assert values["summary"]["l2"]["1s"] == pytest.approx(expected, abs=1e-6)

"""A recorded case of the published planning metric: scenes, predictions, rasters, and everything drawn."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spacedrive_jax.evaluation.collision import (
    Grid,
    Obstacles,
    box_corners,
    collides,
    draw_polygon,
    footprints,
    off_road_cells,
    tangent_yaw,
    to_cells,
)
from spacedrive_jax.evaluation.metrics import StepScores, score_steps
from spacedrive_jax.evaluation.protocols import Protocol, StepRule
from tests.golden.verify.case_files import read_arrays, read_settings

VEHICLE_INDICES = np.arange(8, 18)
"""Positions of the ten vehicle categories in the nuScenes category table."""
STEPS = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """A case folder; see the module."""

    settings: Mapping[str, Any]
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    @property
    def tokens(self) -> list[str]:
        """The scenes."""
        return self.settings["tokens"]

    def prediction(self, token: str) -> np.ndarray | None:
        """The first six predicted waypoints; None where there is no or too short a prediction."""
        waypoints = self.inputs.get(f"{token}/pred")
        return None if waypoints is None or len(waypoints) < STEPS else waypoints[:STEPS]

    def reference(self, token: str) -> np.ndarray:
        """The recorded waypoints."""
        return self.inputs[f"{token}/gt_planning"][0, :, :2]

    def obstacles(self, token: str) -> Obstacles:
        """The vehicles at the six future steps."""
        now = self.boxes(token)
        chosen = self.vehicles(token)
        shift = self.inputs[f"{token}/gt_fut_traj"][chosen, :STEPS].cumsum(axis=1)
        turn = self.inputs[f"{token}/gt_fut_yaw"][chosen, :STEPS].cumsum(axis=1)
        return Obstacles(
            centre=now[chosen][:, None, :2] + shift,
            yaw=now[chosen][:, 6:7] + turn,
            size=now[chosen][:, 3:5],
            mask=self.inputs[f"{token}/gt_fut_traj_mask"][chosen, :STEPS] == 1,
        )

    def boxes(self, token: str) -> np.ndarray:
        """All annotated boxes now, x y z length width height yaw."""
        return self.inputs[f"{token}/gt_boxes"].reshape(-1, 7)

    def vehicles(self, token: str) -> np.ndarray:
        """Which of them are vehicles."""
        return np.isin(self.inputs[f"{token}/gt_fut_idx"].reshape(-1), VEHICLE_INDICES)

    def drivable(self, token: str, rule: StepRule) -> np.ndarray:
        """The drivable raster on the rule's grid."""
        cells = Grid(rule.resolution).cells
        packed = self.inputs[f"{token}/drivable_{cells}_packbits"]
        return np.unpackbits(packed)[: cells * cells].reshape(cells, cells)

    @functools.cached_property
    def scored(self) -> list[str]:
        """Scenes with a usable prediction."""
        return [token for token in self.tokens if self.prediction(token) is not None]

    def steps(self, token: str, protocol: Protocol) -> StepScores:
        """The scores of a scene with a usable prediction."""
        prediction = self.prediction(token)
        assert prediction is not None
        assert isinstance(protocol.steps, StepRule)
        return score_steps(
            prediction[None],
            self.reference(token),
            self.obstacles(token),
            self.drivable(token, protocol.steps),
            protocol.steps,
        )


def read_case(folder: Path) -> Case:
    """Reads a case; of two sets of outputs, the one the installed OpenCV draws like.

    Raises:
        DataError: a file is missing.
    """
    # OpenCV 4.12 and 5 fill some border cells differently from 4.10.
    newer = tuple(map(int, cv2.__version__.split(".")[:2])) >= (4, 12)
    outputs = folder / "outputs_opencv5.npz"
    if not (newer and outputs.is_file()):
        outputs = folder / "outputs.npz"
    return Case(read_settings(folder), read_arrays(folder / "inputs.npz"), read_arrays(outputs))


class Scene:
    """Everything drawn for one scene under one step rule."""

    def __init__(self, case: Case, token: str, rule: StepRule) -> None:
        prediction = case.prediction(token)
        assert prediction is not None
        self.case, self.token, self.rule, self.grid = case, token, rule, Grid(rule.resolution)
        self.trajectory = prediction[None]

    @functools.cached_property
    def hits(self) -> np.ndarray:
        """Collisions of the prediction (row 0) and of the recorded drive (row 1)."""
        both = np.concatenate([self.trajectory, self.case.reference(self.token)[None]])
        return collides(both, self.case.obstacles(self.token), self.rule)

    @functools.cached_property
    def agents(self) -> np.ndarray:
        """Cells covered by vehicles, now and at the six steps."""
        obstacles = self.case.obstacles(self.token)
        boxes = self.case.boxes(self.token)[self.case.vehicles(self.token)]
        polygons = to_cells(box_corners(obstacles.centre, obstacles.yaw, obstacles.size[:, None]), self.grid)
        now = to_cells(box_corners(boxes[:, :2], boxes[:, 6], boxes[:, 3:5]), self.grid)
        slices = [now, *(polygons[obstacles.mask[:, step], step] for step in range(STEPS))]
        return np.stack([self._draw(vertices) for vertices in slices])

    @functools.cached_property
    def ego(self) -> np.ndarray:
        """Cells of the box tested against the drivable area, now and at the six steps."""
        return np.stack([self._draw(polygon[None]) for polygon in footprints(self.trajectory, self.rule)[0]])

    def _draw(self, polygons: np.ndarray) -> np.ndarray:
        raster = self.grid.empty()
        for vertices in polygons:
            draw_polygon(raster, vertices)
        return raster

    def off_road(self) -> np.ndarray:
        """Non-drivable cells under the box."""
        drivable = self.case.drivable(self.token, self.rule)
        return off_road_cells(self.trajectory, drivable, self.rule)[0]

    def points(self) -> np.ndarray:
        """Whether the waypoints themselves lie on a vehicle; the scripts compute and never use it."""
        cells = ((self.trajectory[0] - self.grid.first_centre) / self.grid.cell_size).astype(np.int64)
        inside = np.all((cells >= 0) & (cells < self.grid.cells), axis=1) & ~self.hits[1]
        column, row = np.clip(cells, 0, self.grid.cells - 1).T
        return inside & (self.agents[np.arange(1, STEPS + 1), row, column] > 0)

    def yaw(self) -> np.ndarray:
        """Heading of the box tested against the drivable area."""
        return tangent_yaw(self.trajectory)[0] if self.rule.footprint_yaw == "tangent" else np.zeros(STEPS)

    def corners(self) -> np.ndarray:
        """All annotated boxes' vertices now."""
        boxes = self.case.boxes(self.token)
        return sort_corners(to_cells(box_corners(boxes[:, :2], boxes[:, 6], boxes[:, 3:5]), self.grid))


def sort_corners(polygons: np.ndarray) -> np.ndarray:
    """Vertices of each polygon in a fixed order: where a box begins says nothing."""
    return np.array([sorted(map(tuple, polygon)) for polygon in polygons], np.int64).reshape(-1, 4, 2)

"""Checks the open-loop protocols against the published scripts' numbers: `kind` metrics.

A case holds scenes with predictions and drivable rasters, and what the published code made of them: its
pieces per step, its sums per sample, what it printed, and how it reads answers. What is recorded is compared.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spacedrive_jax.console import UserError
from spacedrive_jax.evaluation.collision import Obstacles, collides
from spacedrive_jax.evaluation.counterfactual import Item, count_risks, parse_candidates
from spacedrive_jax.evaluation.drivable import footprints, off_road_cells, tangent_yaw
from spacedrive_jax.evaluation.metrics import StepScores, score_steps
from spacedrive_jax.evaluation.predictions import discretize, sort_predictions
from spacedrive_jax.evaluation.protocols import OMNIDRIVE, UNIAD, VAD, Protocol, StepRule
from spacedrive_jax.evaluation.published_predictions import parse_answer
from spacedrive_jax.evaluation.rasters import Grid, box_corners, draw_polygon, to_cells
from spacedrive_jax.verify.check import Check, compare
from spacedrive_jax.verify.planning_scripts import SUMS, ScriptSums, add_up

PROTOCOLS: Mapping[str, Protocol] = {"ours": OMNIDRIVE, "vad": VAD, "uniad": UNIAD}
"""The case's names of the protocols."""
VEHICLE_INDICES = np.arange(8, 18)
"""Positions of the ten vehicle categories in the nuScenes category table."""
STEPS = 6
DISTANCE = 1e-6
"""Metres; counts, cells and shares are compared to this too, which for them means equal."""


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


def verify_metrics(folder: Path) -> list[Check]:
    """A `Verifier`: every recorded piece, sum, printed number and parsed text.

    Raises:
        UserError: a file of the case is missing.
    """
    case = read_case(folder)
    checks: list[Check] = []
    for name, protocol in PROTOCOLS.items():
        checks += _pieces(case, name, protocol)
        checks += _sums(case, name, protocol)
    checks += [*_texts(case), *_commands(case), *_counterfactual(case, folder)]
    return checks


def read_case(folder: Path) -> Case:
    """Reads a case; of two sets of outputs, the one the installed OpenCV draws like.

    Raises:
        UserError: a file is missing.
    """
    # OpenCV 4.12 and 5 fill some border cells differently from 4.10.
    newer = tuple(map(int, cv2.__version__.split(".")[:2])) >= (4, 12)
    outputs = folder / "outputs_opencv5.npz"
    if not (newer and outputs.is_file()):
        outputs = folder / "outputs.npz"
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return Case(settings, dict(np.load(folder / "inputs.npz")), dict(np.load(outputs)))
    except OSError as error:
        raise UserError(f"{folder}: cannot read {error.filename}") from None


def _pieces(case: Case, name: str, protocol: Protocol) -> Iterator[Check]:
    """Per scene and step; one check for each kind of piece, over all scenes that have it."""
    assert isinstance(protocol.steps, StepRule)
    pieces: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for token in case.scored:
        wanted = {kind for kind in _PIECES if f"{name}/raw/{token}/{kind}" in case.outputs}
        scene = _Scene(case, token, protocol.steps)
        for kind in sorted(wanted):
            expected = case.outputs[f"{name}/raw/{token}/{kind}"]
            actual = _PIECES[kind](scene)
            if kind == "agent_poly":
                expected = _sort_corners(expected)
            pieces.setdefault(kind, []).append((actual, expected))
    for kind, pairs in sorted(pieces.items()):
        actual, expected = (
            np.concatenate([np.ravel(part) for part in side]) for side in zip(*pairs, strict=True)
        )
        tolerance = 1e-9 if kind == "pred_yaw" else 0.0
        yield compare(f"{name}/raw/{kind}", actual, expected, atol=tolerance, rtol=0.0)


class _Scene:
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
        return _sort_corners(to_cells(box_corners(boxes[:, :2], boxes[:, 6], boxes[:, 3:5]), self.grid))


_PIECES: Mapping[str, Callable[[_Scene], np.ndarray]] = {
    "box_coll": lambda scene: scene.hits[0] & ~scene.hits[1],
    "gt_box_coll": lambda scene: scene.hits[1],
    "point_coll": _Scene.points,
    "offroad_cells": _Scene.off_road,
    "agent_seg_area": lambda scene: scene.agents.sum(axis=(1, 2), dtype=np.int64),
    "agent_seg_packbits": lambda scene: np.packbits(scene.agents),
    "ego_seg_area": lambda scene: scene.ego.sum(axis=(1, 2), dtype=np.int64),
    "ego_seg_packbits": lambda scene: np.packbits(scene.ego),
    "pred_yaw": _Scene.yaw,
    "agent_poly": _Scene.corners,
}


def _sort_corners(polygons: np.ndarray) -> np.ndarray:
    """Vertices of each polygon in a fixed order: where a box begins says nothing."""
    return np.array([sorted(map(tuple, polygon)) for polygon in polygons], np.int64).reshape(-1, 4, 2)


def _sums(case: Case, name: str, protocol: Protocol) -> Iterator[Check]:
    """What the script adds up for each sample alone, and prints for all of them."""
    whole = {
        index: case.steps(token, protocol)
        for index, token in enumerate(case.tokens)
        if token in case.scored and case.inputs[f"{token}/gt_planning_mask"].all()
    }
    alone = {index: add_up([(index, steps)], protocol) for index, steps in whole.items()}
    nothing = ScriptSums()
    rows = [alone.get(index, nothing) for index in range(len(case.tokens))]
    folder = f"{name}/per_sample_single_call"
    if f"{folder}/samples" in case.outputs:
        counts = np.array([row.samples for row in rows])
        yield compare(f"{folder}/samples", counts, case.outputs[f"{folder}/samples"], rtol=0.0)
    for position, metric in enumerate(SUMS):
        for column in range(3):
            key = f"{folder}/{metric}_{column + 1}s"
            if key in case.outputs:
                values = np.array([row.values[position, column] for row in rows])
                yield compare(key, values, case.outputs[key], atol=DISTANCE, rtol=0.0)
    recorded = case.settings.get(f"{name}/exceptions")
    if recorded is not None:
        short = [
            token for token in case.tokens if f"{token}/pred" in case.inputs and token not in case.scored
        ]
        raised = {case.tokens[index] for row in alone.values() for index in row.raised} | set(short)
        yield compare(f"{name}/exceptions", sorted(raised), sorted(recorded), rtol=0.0)
    for threads in (1, 4):
        printed = _printed(whole, len(case.tokens), protocol, threads)
        yield from _printed_checks(
            f"{name}/aggregate_threads{threads}",
            printed,
            case.settings.get(f"{name}/aggregate_threads{threads}"),
        )
        if threads == 1:
            main = case.settings.get("main_run", {}).get(name)
            yield from _printed_checks(f"main_run/{name}", printed, main)


def _printed(
    whole: Mapping[int, StepScores], count: int, protocol: Protocol, threads: int
) -> dict[str, float]:
    """What the script prints when its threads run one after another."""
    share = count // threads
    sums = ScriptSums()
    for thread in range(threads):
        last = count if thread == threads - 1 else (thread + 1) * share
        part = [(index, steps) for index, steps in whole.items() if thread * share <= index < last]
        add_up(part, protocol, sums)
    return sums.printed()


def _printed_checks(
    name: str, printed: Mapping[str, float], recorded: Mapping[str, float] | None
) -> Iterator[Check]:
    if recorded is not None:
        keys = sorted(recorded)
        ours = [printed.get(key, np.nan) for key in keys]
        yield compare(name, ours, [recorded[key] for key in keys], atol=DISTANCE, rtol=0.0)


def _texts(case: Case) -> Iterator[Check]:
    texts = case.settings.get("text_parsing", [])
    if texts:
        ours = [parse_answer(entry["text"]) for entry in texts]
        # A failure of the published script drops the sample, like a text without a trajectory.
        theirs = [np.array(e["coords"]) if isinstance(e["coords"], list) else None for e in texts]
        yield compare("text_parsing", _flat(ours), _flat(theirs), rtol=0.0)
    for entry in case.settings.get("discrete", []):
        points = np.array(entry["inp"], np.float64)
        padded = np.concatenate([points, np.zeros((STEPS, 2))])[:STEPS]
        floored = discretize(sort_predictions(Path(), [("x", "", padded)]), entry["res"]).waypoints["x"]
        yield compare(f"discrete {entry['res']}", floored[: len(points)], entry["out"], rtol=0.0)


def _flat(trajectories: list[np.ndarray | None]) -> np.ndarray:
    """Trajectories as one row of numbers: how many waypoints (-1 for none), then the waypoints."""
    parts = [
        np.array([-1.0]) if points is None else np.concatenate([[len(points)], points.ravel()])
        for points in trajectories
    ]
    return np.concatenate(parts)


def _commands(case: Case) -> Iterator[Check]:
    if "command/command" in case.outputs:
        # The command rule is data preparation's; nothing but this comparison looks that way.
        from data_prep.nuscenes.commands import released_command

        ends = case.inputs["command/gt_planning"][:, -1]
        ours = [released_command(end) for end in ends]
        yield compare("command/command", ours, case.outputs["command/command"], rtol=0.0)


def _counterfactual(case: Case, folder: Path) -> Iterator[Check]:
    lines = case.settings.get("counterfactual_stdout")
    path = folder / "counterfactual_items.json"
    if lines is None or not path.is_file():
        return
    items = [
        Item(entry["id"], entry["pred"][0]["Q"], entry["pred"][0]["C"], parse_candidates(entry["annos"]))
        for entry in json.loads(path.read_text(encoding="utf-8"))
        if entry["pred"]
    ]
    counts, unmatched = count_risks(items, "published")
    titles = {
        "collision": "Collision",
        "red_light": "Red Light",
        "drivable_area": "Out of Drivable Area",
        "safe": "Safe",
    }
    numbers = [float(len(items) - len(unmatched))]
    for risk in titles:
        numbers += dataclasses.astuple(counts[risk])
    for ratio in ("accuracy", "precision", "recall"):
        for risk in titles:
            value = counts[risk].to_json()[ratio]
            numbers.append(0.0 if value is None else float(value))
    printed = [
        float(value) for line in lines for value in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", line)
    ]
    yield compare("counterfactual", numbers, printed, atol=1e-12, rtol=0.0)

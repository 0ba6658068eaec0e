"""The open-loop protocols on degenerate scenes, against plain loops over whole rasters.

Written from the rules of the published scripts (docs/fidelity.md, Q1 to Q10): every box is drawn, nothing is
culled, and trajectories come one by one. Scenes are what a reader of the rules would try to break them with:
nobody around, everybody masked, boxes on the edge of the grid, steps exactly at the bounds of the heading
rules, a recorded drive that collides itself, a car that stands off the road.
"""

import math

import cv2
import numpy as np
import pytest
from skimage.draw import polygon

from spacedrive_jax.evaluation.evaluate import obstacles_of
from spacedrive_jax.evaluation.metrics import horizon_scores, score_steps, summarize
from spacedrive_jax.evaluation.protocols import PROTOCOLS
from tests.record_factory import make_record

pytestmark = pytest.mark.parity

PITCH = {"omnidrive": 0.1, "vad": 0.5, "uniad": 0.5}
FORWARD = {"omnidrive": 0.0, "vad": 0.5, "uniad": 0.5}
OBSTACLES = {"car", "motorcycle", "bicycle", "bus", "truck", "construction", "emergency", "trailer"}
AHEAD = np.stack([2.5 * np.arange(1, 7), np.zeros(6)], axis=1)
STILL = np.zeros((6, 2))


class Published:
    """One keyframe under one of the three published protocols."""

    def __init__(self, mode, agents, road):
        self.mode, self.pitch = mode, np.float32(PITCH[mode])
        self.first = np.float32(-50 + PITCH[mode] / 2)
        self.cells = round(100 / PITCH[mode])
        self.road = road
        self.occupied = [self.blank() for _ in range(6)]
        for name, box, futures, yaws, mask in agents:
            kind = name.split(".")
            if kind[0] != "vehicle" or kind[1] not in OBSTACLES:
                continue
            for step in range(6):
                if mask[step]:
                    self.draw(self.occupied[step], box[:2] + futures[step], yaws[step], box[3], box[4])

    def blank(self):
        return np.zeros((self.cells, self.cells), np.uint8)

    def draw(self, raster, centre, yaw, length, width):
        along, across = np.array([math.cos(yaw), math.sin(yaw)]), np.array([-math.sin(yaw), math.cos(yaw)])
        signs = ((1, 1), (1, -1), (-1, -1), (-1, 1))
        corners = np.array([centre + a * length / 2 * along + b * width / 2 * across for a, b in signs])
        cells = np.round((corners - self.first + self.pitch / 2) / self.pitch).astype(np.int32)
        cv2.fillPoly(raster, [cells], 1)

    def collisions(self, trajectory):
        forward, half = FORWARD[self.mode], np.array([4.084, 1.85]) / 2
        xs = np.array([forward - half[0], forward + half[0], forward + half[0], forward - half[0]])
        ys = np.array([half[1], half[1], -half[1], -half[1]])
        columns, rows = polygon((xs - self.first) / self.pitch, (ys - self.first) / self.pitch)
        shift, hits = np.float64(self.first / self.pitch), []
        for step, here in enumerate(trajectory):
            move = here - (trajectory[step - 1] if step else 0.0)
            yaw = math.atan2(move[1], move[0]) if math.sqrt(move[0] ** 2 + move[1] ** 2) >= 1 else 0.0
            cos, sin = float(np.float32(math.cos(yaw))), float(np.float32(math.sin(yaw)))
            x, y = columns + shift, rows + shift
            turned = np.round(np.stack([cos * x - sin * y, sin * x + cos * y], axis=1) - shift)
            cells = np.trunc(turned + here / self.pitch)
            cells = np.clip(cells, 0, self.cells - 1).astype(int)
            hits.append(bool(self.occupied[step][cells[:, 1], cells[:, 0]].any()))
        return hits

    def off_road(self, trajectory):
        yaw, before, found = 0.0, np.zeros(2), []
        for step in range(7):
            here = trajectory[step - 1] if step else np.zeros(2)
            if step and self.mode == "omnidrive":
                move = here - before
                if math.sqrt(move[0] ** 2 + move[1] ** 2) >= (0.5 if step == 1 else 0.3):
                    yaw = math.atan2(move[1], move[0])
            before, raster = here, self.blank()
            self.draw(raster, here, yaw, 4.08, 1.85)
            found.append(bool((raster & (self.road == 0)).any()))
        return found

    def scores(self, trajectory, truth):
        """L2, collision and intersection at 1, 2 and 3 s: metres, 0..1, 0..1."""
        errors = [math.dist(mine, theirs) for mine, theirs in zip(trajectory, truth, strict=True)]
        own = self.collisions(truth)
        hits = [hit and not excluded for hit, excluded in zip(self.collisions(trajectory), own, strict=True)]
        starts, *leaves = self.off_road(trajectory)
        leaves = [left and not starts for left in leaves]
        rows = []
        for steps in (2, 4, 6):
            error = errors[steps - 1] if self.mode == "uniad" else sum(errors[:steps]) / steps
            share = (lambda seen: sum(seen) / len(seen)) if self.mode == "vad" else any
            rows.append((error, float(share(hits[:steps])), float(share(leaves[:steps]))))
        return np.array(rows).T


def agent(x, y, yaw=0.0, size=(4.5, 1.9), kind="vehicle.car", mask=(1,) * 6, speed=(0.0, 0.0)):
    """Category, box, displacements, headings, mask."""
    box = np.array([x, y, 0.8, *size, 1.6, yaw])
    return kind, box, np.outer(np.arange(1, 7) * 0.5, speed), np.full(6, yaw), np.array(mask, bool)


def path(*steps):
    return np.cumsum(np.array(steps, float), axis=0)


CAR = agent(10, 0)
AROUND = {
    "nobody": [],
    "everybody_masked": [agent(5, 0, mask=(0,) * 6), agent(10, 0, mask=(0,) * 6)],
    "seen_at_the_last_step_alone": [agent(15, 0, mask=(0, 0, 0, 0, 0, 1))],
    "no_vehicle": [
        agent(5, 0, kind=kind)
        for kind in ("human.pedestrian.adult", "movable_object.barrier", "static_object.bicycle_rack")
    ],
    "ten_in_one_place": [CAR] * 10,
    "on_the_ego_vehicle": [agent(0, 0)],
    "on_every_edge": [agent(50, 0), agent(-50, 3), agent(4, 50), agent(-3, -50), agent(50, 50, 0.7)],
    "over_the_whole_grid": [agent(0, 0, size=(300.0, 300.0))],
    "smaller_than_a_cell": [agent(7.25, 0.25, size=(0.01, 0.01)), agent(12.5, -0.4, size=(0.01, 0.2))],
    "touching_the_side": [agent(10, 0.925 + 0.95), agent(10, -(0.925 + 0.95))],
    "beyond_the_grid": [agent(500, 0), agent(-1e6, 1e6)],
    "passing": [agent(30, 0, math.pi, speed=(-9.0, 0.0)), agent(8, -12, math.pi / 2, speed=(0.0, 6.0))],
}
TRAJECTORIES = {
    "ahead": AHEAD,
    "standing": STILL,
    "backwards": -AHEAD,
    "steps_of_exactly_a_metre": path((0.6, 0.8), (1, 0), (0, 1), (-1, 0), (0.8, -0.6), (0, -1)),
    "first_step_of_exactly_half_a_metre": path(
        (0.3, 0.4), (0.18, 0.24), (0.0, 0.25), (0.25, 0), (0, -3), (0, 0)
    ),
    "to_the_edge_and_beyond": np.array([(30, 0), (49.95, 0), (50, 0), (50, 50), (80, 0), (-50, -50)], float),
    "out_of_sight": np.full((6, 2), 9000.0),
    "jumping": np.array([(10, 0), (-10, 0), (10, 1.9), (-45, 20), (10, 0), (10, 0)], float),
}
ROADS = ("everywhere", "nowhere", "lane", "hole_at_the_start")


def road(kind, cells):
    raster = np.full((cells, cells), kind not in ("nowhere", "lane"), np.uint8)
    middle, half = cells // 2, round(cells * 0.03)
    if kind == "lane":
        raster[middle - half : middle + half] = 1
    if kind == "hole_at_the_start":
        raster[middle - half // 4 : middle, middle : middle + half] = 0
    return raster


@pytest.mark.parametrize("mode", PITCH)
@pytest.mark.parametrize("around", AROUND)
def test_scores_equal_the_plain_loops(mode, around):
    agents, protocol = AROUND[around], PROTOCOLS[mode]
    record = make_record(
        np.random.default_rng(0),
        agent_category=[each[0] for each in agents],
        agent_boxes=np.array([each[1] for each in agents]).reshape(-1, 7),
        agent_future=np.array([each[2] for each in agents]).reshape(-1, 6, 2),
        agent_future_yaw=np.array([each[3] for each in agents]).reshape(-1, 6),
        agent_future_mask=np.array([each[4] for each in agents], bool).reshape(-1, 6),
    )
    planned = np.array(list(TRAJECTORIES.values()))
    kinds = ROADS if around in ("nobody", "passing") else ROADS[2:3]
    for kind in kinds:
        drivable = road(kind, round(100 / PITCH[mode]))
        published = Published(mode, agents, drivable)
        for truth in (AHEAD, STILL, TRAJECTORIES["jumping"]):
            steps = score_steps(planned, truth, obstacles_of(record), drivable, protocol.steps)
            found = horizon_scores(steps, protocol)
            expected = np.array([published.scores(each, truth) for each in planned])
            for place, name in enumerate(("l2", "collision", "intersection")):
                ours = getattr(found, name)
                np.testing.assert_allclose(ours, expected[:, place], atol=1e-12, err_msg=f"{name}, {kind}")
            means = summarize(found)
            percent = 100 * expected[:, 1].mean(axis=0)
            assert [means["collision"][f"{second}s"] for second in (1, 2, 3)] == pytest.approx(list(percent))
            assert means["collision"]["avg"] == pytest.approx(percent.mean())

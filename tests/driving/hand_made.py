"""Drives made by hand: a straight road, an ego vehicle whose motion is given, and whoever else is wanted."""

from __future__ import annotations

import dataclasses

import numpy as np
import shapely

from spacedrive_jax.driving.drive_log import DriveLog, LaneMap
from spacedrive_jax.world import traffic
from spacedrive_jax.world.scenario import EGO_AHEAD, EGO_SIZE, Scenario
from spacedrive_jax.world.town import Junction, Lane, Road, Town
from spacedrive_jax.world.traffic import Cast, Motion, Mover, Obstacle, Priority, Signals
from spacedrive_jax.world.vehicle import VehicleState
from spacedrive_jax.world.world import World, WorldState

STEP = 0.1
LENGTH = 200.0
LEFT = np.array([0.0, 1.75])
"""Half a lane."""
JUNCTION = 0
"""Centre at x = 220; its road arrives from the west by arm 2."""


def straight_town() -> Town:
    """One road along x with a lane each way, a signalised junction at its end."""
    x = np.linspace(0.0, LENGTH, 201)
    centre = np.stack([x, np.zeros_like(x)], axis=1)
    forward = Lane("forward", centre - [0, 1.75], 0, JUNCTION, 2, 0, "", ("across",))
    backward = Lane("backward", centre[::-1] + LEFT, 0, 1, 0, 0, "", ())
    over = np.stack([np.linspace(200, 240, 81), np.full(81, -1.75)], axis=1)
    across = Lane("across", over, None, JUNCTION, 2, 0, "straight", ("beyond",))
    far = np.stack([np.linspace(240, 400, 161), np.full(161, -1.75)], axis=1)
    beyond = Lane("beyond", far, 1, 2, 2, 0, "", ())
    lanes = {lane.key: lane for lane in (forward, backward, across, beyond)}
    junctions = (
        Junction(0, np.array([220.0, 0.0]), 0.0, 20.0, (0, 1, 2)),
        Junction(1, np.array([-20.0, 0.0]), 0.0, 20.0, (0, 2)),
        Junction(2, np.array([420.0, 0.0]), 0.0, 20.0, (0, 2)),
    )
    roads = (Road(0, (1, 0), (0, 2), centre, 1, 0.0), Road(1, (0, 0), (2, 2), far + LEFT, 1, 0.0))
    ground = shapely.box(-10.0, -3.5, 410.0, 3.5)
    return Town("boston-seaport", True, roads, lanes, junctions, (), ground, shapely.Polygon())


TOWN = straight_town()
LANES = LaneMap(TOWN)


@dataclasses.dataclass(frozen=True)
class Other:
    """Somebody beside the ego vehicle: the box centre at each step (or one pose for all), and its speed."""

    category: str
    poses: np.ndarray
    speed: float = 0.0
    size: tuple[float, float, float] = (4.0, 2.0, 1.5)


def make_log(
    x: np.ndarray,
    y: np.ndarray | float = -1.75,
    *,
    yaw: np.ndarray | float = 0.0,
    others: tuple[Other, ...] = (),
    goal: float = 150.0,
    green: bool = True,
    priority: Priority | None = None,
) -> DriveLog:
    """A drive along the road.

    Args:
        x: of the rear axle at every step, metres.
        y: likewise; the lane's centre by default.
        yaw: radians.
        others: movers (more than one pose) before obstacles (one pose).
        goal: metres along the route at which it ends.
        green: of the junction's light for the road.
        priority: who goes first there, in place of lights.
    """
    steps = len(x)
    y, yaw = np.broadcast_to(y, steps), np.broadcast_to(yaw, steps)
    route = traffic.lane_route(TOWN, ["forward", "across", "beyond"])
    movers = [
        Mover("ego", "vehicle.car", EGO_SIZE, route, 0.0, 0.0, lambda _: 0.0, reference_to_centre=EGO_AHEAD)
    ]
    obstacles = []
    for number, other in enumerate(others):
        if other.poses.ndim == 2:
            movers.append(Mover(f"mover{number}", other.category, other.size, route, 0.0, 0.0, _still))
        else:
            pose = tuple(float(value) for value in other.poses)
            obstacles.append(Obstacle(f"thing{number}", other.category, other.size, pose))
    lights = {JUNCTION: ((-1.0, (2 if green else 1,)),)}
    rules = {} if priority is None else {JUNCTION: priority}
    signals = Signals(np.zeros(3), ((0, 1, 2), (0, 2), (0, 2)), lights, rules)
    scenario = Scenario(TOWN, "cruise", "", Cast(tuple(movers), tuple(obstacles), signals), ())
    velocity = (
        np.hypot(np.gradient(x, STEP, edge_order=2), np.gradient(y, STEP, edge_order=2))
        if steps > 1
        else np.zeros(1)
    )
    ego = np.stack([x, y, yaw, velocity, np.zeros(steps), np.zeros(steps)], axis=1)
    box = np.stack([x + EGO_AHEAD * np.cos(yaw), y + EGO_AHEAD * np.sin(yaw), yaw], axis=1)
    poses = [box, *(np.broadcast_to(other.poses, (steps, 3)) for other in others)]
    speeds = [velocity, *(np.full(steps, other.speed) for other in others)]
    return DriveLog(
        scenario=scenario,
        time=STEP * np.arange(steps),
        ego=ego,
        s=np.asarray(x, np.float64),
        aside=np.asarray(y, np.float64) + 1.75,
        poses=np.stack(poses, axis=1),
        speeds=np.stack(speeds, axis=1),
        goal=goal,
    )


def make_world(*states: tuple[float, float, VehicleState], motions: tuple[Motion, ...] = ()) -> World:
    """A world on the road, in states that are given: seconds, metres along the route, and the vehicle."""
    world = World(dataclasses.replace(make_log(np.zeros(1)).scenario, motions=motions))
    start = world.traffic.start()
    world.states = [
        WorldState(dataclasses.replace(start, step=round(time / STEP), s=np.array([s])), vehicle)
        for time, s, vehicle in states
    ]
    return world


def _still(_: float) -> float:
    return 0.0


def cruise(metres: float, speed: float = 8.0, start: float = 10.0) -> np.ndarray:
    """x at constant speed."""
    return start + speed * STEP * np.arange(round(metres / speed / STEP) + 1)

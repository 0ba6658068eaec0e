"""What the expert would do from wherever a policy has got to: targets to learn from one's own mistakes.

(DAgger, Ross, Gordon and Bagnell 2011: the states are the learner's, the labels the expert's.)
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_PATH_POINTS, NUM_WAYPOINTS
from spacedrive_jax.data.ego_status import released_command
from spacedrive_jax.data.schema import Record
from spacedrive_jax.driving.driver import Driver, to_vehicle
from spacedrive_jax.driving.plans import Plan
from spacedrive_jax.driving.policies import PATH_POINTS, expert
from spacedrive_jax.world.traffic import TIME_STEP
from spacedrive_jax.world.world import World

STEP_S = 0.5


@dataclasses.dataclass(frozen=True)
class ExpertTarget:
    """Where the expert would be, in the present ego frame."""

    waypoints: Float[np.ndarray, "6 2"]
    yaw: Float[np.ndarray, " 6"]
    path: Float[np.ndarray, "50 2"]


def expert_target(world: World) -> ExpertTarget:
    """The expert's way on from the present state, driven out: back to its route where it is off it.

    The expert's plan runs along the route; the vehicle that follows it comes back as a vehicle can, and that
    drive is the target. Nothing changes in the world.
    """
    vehicle = world.state.vehicle
    assert vehicle is not None, "there is a target where somebody steers"
    plan: Plan = expert(world, {})
    driver = Driver(limits=world.limits)
    driver.follow(plan, vehicle, world.state.time)
    state, poses = world.state, []
    for step in range(1, NUM_WAYPOINTS * round(STEP_S / TIME_STEP) + 1):
        assert state.vehicle is not None
        _, state = world.advance(state, driver.control(state.vehicle, state.time))
        assert state.vehicle is not None
        if step % round(STEP_S / TIME_STEP) == 0:
            poses.append((state.vehicle.x, state.vehicle.y, state.vehicle.yaw - vehicle.yaw))
    places = np.array(poses)
    ahead = float(world.state.traffic.s[0]) + np.arange(1, NUM_PATH_POINTS + 1)
    path = to_vehicle(world.scenario.ego.route.pose(ahead)[:, :2], vehicle)
    # Beside the route the way to it bends in over the first metres.
    beside = np.maximum(1.0 - np.arange(1, NUM_PATH_POINTS + 1) / PATH_POINTS, 0.0)
    path[:, 1] -= beside * beside * path[0, 1]
    return ExpertTarget(to_vehicle(places[:, :2], vehicle), places[:, 2], path)


def with_target(record: Record, target: ExpertTarget) -> Record:
    """A record whose future is the expert's."""
    x, y = (float(value) for value in target.waypoints[-1])
    yaw = float(exact.arctan2(*reversed(exact.cos_sin(float(target.yaw[-1])))))
    times = int(record["timestamp_us"]) + round(STEP_S * 1e6) * np.arange(1, NUM_WAYPOINTS + 1)
    return {
        **record,
        "waypoints": target.waypoints,
        "waypoint_yaw": target.yaw,
        "waypoint_mask": np.ones(NUM_WAYPOINTS, bool),
        "waypoint_timestamp_us": times.astype(np.int64),
        "path": target.path,
        "path_mask": np.ones(NUM_PATH_POINTS, bool),
        "command_released": released_command(np.array([x, y, yaw])),
    }

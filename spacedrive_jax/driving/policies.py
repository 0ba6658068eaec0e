"""Planners without a model: the expert, and what every model has to beat.

They know the world they drive in (a model is given records alone, see `model_policy`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_WAYPOINTS
from spacedrive_jax.data.schema import Record
from spacedrive_jax.driving.driver import Plan, to_vehicle
from spacedrive_jax.driving.ego_mlp import fit_ego_mlp
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.evaluation.baselines import mean_trajectory
from spacedrive_jax.world.traffic import TIME_STEP
from spacedrive_jax.world.vehicle import VehicleState
from spacedrive_jax.world.world import World

STEP_S = 0.5
PATH_POINTS = 20
BLIND_SPEED = 6.0
"""m/s of `route_constant_speed`, whatever happens."""
_TIMES = STEP_S * np.arange(1, NUM_WAYPOINTS + 1)


def expert(world: World, record: Record) -> Plan:
    """What the script's own driver would do from here: the world, branched, three seconds on.

    It sees everybody's next decisions, so it is a ceiling, not a rival.
    """
    state = world.traffic.rejoin(world.state.traffic, _vehicle(world).acceleration)
    progress = [float(state.s[0])]
    steps = round(STEP_S / TIME_STEP)
    for _ in range(NUM_WAYPOINTS * steps):
        state = world.traffic.step(state)
        progress.append(float(state.s[0]))
    return _along_route(world, np.array(progress[steps::steps]))


def recorded(world: World, record: Record) -> Plan:
    """Where the script drove, at the times at which it did, whatever has happened since."""
    motion = world.scenario.motions[0]
    end = TIME_STEP * (len(motion.s) - 1)
    s = np.array([motion.at(min(world.state.time + later, end))[0] for later in _TIMES])
    return _along_route(world, s)


def route_constant_speed(world: World, record: Record) -> Plan:
    """Along the route at `BLIND_SPEED`: knows where to go and sees nothing."""
    return _along_route(world, float(world.state.traffic.s[0]) + BLIND_SPEED * _TIMES)


def constant_velocity(world: World, record: Record) -> Plan:
    """Straight on at the present speed."""
    speed = _vehicle(world).speed
    return Plan(np.stack([speed * _TIMES, np.zeros(NUM_WAYPOINTS)], axis=1))


def constant_yaw_rate(world: World, record: Record) -> Plan:
    """Along the present circle at the present speed."""
    vehicle = _vehicle(world)
    return Plan(arc(vehicle.speed * _TIMES, vehicle.curvature))


def standing_still(world: World, record: Record) -> Plan:
    """Nowhere."""
    return Plan(np.zeros((NUM_WAYPOINTS, 2)))


def arc(lengths: Float[np.ndarray, " T"], curvature: float) -> Float[np.ndarray, "T 2"]:
    """Points along a circle that leaves the origin forwards, metres."""
    half = np.asarray(lengths, np.float64) * curvature / 2
    cos, sin = exact.cos_sin(half)
    # The chord of an arc; sin(x)/x by its series where x is next to nothing.
    small = np.abs(half) < 1e-6
    chord = lengths * np.where(small, 1 - half * half / 6, sin / np.where(small, 1.0, half))
    return np.stack([chord * cos, chord * sin], axis=1)


def _along_route(world: World, s: Float[np.ndarray, " T"]) -> Plan:
    """A plan through places on the route, with the route ahead as its path."""
    route, vehicle = world.scenario.ego.route, _vehicle(world)
    here = float(world.state.traffic.s[0])
    ahead = here + np.arange(1, PATH_POINTS + 1)
    return Plan(to_vehicle(route.pose(s)[:, :2], vehicle), path=to_vehicle(route.pose(ahead)[:, :2], vehicle))


def _vehicle(world: World) -> VehicleState:
    vehicle = world.state.vehicle
    assert vehicle is not None, "a policy drives a steered vehicle"
    return vehicle


@dataclasses.dataclass(frozen=True)
class FixedPlan:
    """A policy that answers the same whatever it sees (the mean trajectory of a data set)."""

    waypoints: Float[np.ndarray, "6 2"]

    def __call__(self, world: World, record: Record) -> Plan:
        """The plan."""
        return Plan(self.waypoints)


POLICIES: Mapping[str, Callable[[World, Record], Plan]] = {
    "expert": expert,
    "recorded": recorded,
    "route_constant_speed": route_constant_speed,
    "constant_velocity": constant_velocity,
    "constant_yaw_rate": constant_yaw_rate,
    "standing_still": standing_still,
}


def policy_named(name: str, records: Sequence[Record] | None = None) -> Callable[[World, Record], Plan]:
    """A policy by its name.

    Args:
        name: a key of `POLICIES`, `mean_trajectory` or `ego_mlp`.
        records: the training keyframes that the last two learn from.

    Raises:
        ConfigError: there is no such policy, or it needs records.
    """
    if name in POLICIES:
        return POLICIES[name]
    if name not in ("mean_trajectory", "ego_mlp"):
        raise ConfigError(
            f"no policy {name!r}: choose {', '.join((*POLICIES, 'mean_trajectory', 'ego_mlp'))}"
        )
    if records is None:
        raise ConfigError(f"policy {name} learns from records: give --records DIR")
    return FixedPlan(mean_trajectory(records)) if name == "mean_trajectory" else fit_ego_mlp(records)

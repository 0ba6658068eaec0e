"""Planners without a model: the expert, and what every model has to beat.

They know the world they drive in (a model is given records alone, see `model_policy`), but for two that are
learnt from records: the mean trajectory, and an MLP over the ego status.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_WAYPOINTS, WAYPOINT_STEP
from spacedrive_jax.data.schema import Record
from spacedrive_jax.driving.driver import Plan, to_vehicle
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.evaluation.predictions import mean_trajectory
from spacedrive_jax.world.traffic import TIME_STEP
from spacedrive_jax.world.vehicle import VehicleState
from spacedrive_jax.world.world import World

PATH_POINTS = 20
BLIND_SPEED = 6.0
"""m/s of `route_constant_speed`, whatever happens."""
MLP_HIDDEN = 64
MLP_STEPS = 1500
MLP_RATE = 3e-3
NUM_COMMANDS = 8
_TIMES = WAYPOINT_STEP * np.arange(1, NUM_WAYPOINTS + 1)


def expert(world: World, record: Record) -> Plan:
    """What the script's own driver would do from here: the world, branched, three seconds on.

    It sees everybody's next decisions, so it is a ceiling, not a rival.
    """
    state = world.traffic.rejoin(world.state.traffic, _vehicle(world).acceleration)
    progress = [float(state.s[0])]
    steps = round(WAYPOINT_STEP / TIME_STEP)
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


@dataclasses.dataclass(frozen=True)
class EgoMlp:
    """A planner that sees nothing but the ego vehicle's own motion (the kind of AD-MLP, arXiv 2305.10430).

    Two hidden layers; inputs are scaled to mean 0 and deviation 1.

    On nuScenes' L2 it is as good as the best, on Bench2Drive its driving score is 18: a model must beat it
    where it drives.
    """

    mean: Float[np.ndarray, " F"]
    scale: Float[np.ndarray, " F"]
    weights: tuple[Float[np.ndarray, "_ _"], ...]
    biases: tuple[Float[np.ndarray, " _"], ...]

    def __call__(self, world: World, record: Record) -> Plan:
        """The plan; the world is not looked at."""
        values = (ego_features(record) - self.mean) / self.scale
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = exact.dot(weight.T, values[None]) + bias
            if layer + 1 < len(self.weights):
                values = np.maximum(values, 0.0)
        return Plan(values.reshape(NUM_WAYPOINTS, 2))


def ego_features(record: Record) -> Float[np.ndarray, " F"]:
    """CAN bus of now and before, past positions, and the command that only the past decides."""
    command = np.zeros(NUM_COMMANDS)
    command[int(record["command_navigation"])] = 1.0
    present = np.asarray(record["past_mask"], np.float64)
    past = np.asarray(record["past_to_ego"], np.float64)[:, :2, 3] * present[:, None]
    # The orientation quaternion says where north is, which no driver needs: from the acceleration on.
    now = np.asarray(record["can_bus"], np.float64)[4:]
    before = np.asarray(record["past_can_bus"], np.float64)[:, 4:] * present[:, None]
    return np.concatenate([now, before.ravel(), past.ravel(), present, command])


def fit_ego_mlp(records: Sequence[Record], seed: int = 0) -> EgoMlp:
    """Trains on the keyframes whose future is whole (full batch, Adam on the mean absolute error).

    Raises:
        DataError: there are none.
    """
    chosen = [record for record in records if bool(np.all(record["waypoint_mask"]))]
    if not chosen:
        raise DataError("no training keyframe has a whole future to learn from")
    inputs = np.stack([ego_features(record) for record in chosen])
    targets = np.stack([np.asarray(record["waypoints"], np.float64).ravel() for record in chosen])
    mean, scale = inputs.mean(axis=0), inputs.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1.0)
    inputs = (inputs - mean) / scale
    rng = np.random.default_rng(seed)
    sizes = (inputs.shape[1], MLP_HIDDEN, MLP_HIDDEN, 2 * NUM_WAYPOINTS)
    weights = [rng.normal(0, np.sqrt(2 / i), (i, o)) for i, o in itertools.pairwise(sizes)]
    biases = [np.zeros(o) for o in sizes[1:]]
    biases[-1] = targets.mean(axis=0)
    weights[-1] *= 0.1
    parameters = [*weights, *biases]
    first = [np.zeros_like(each) for each in parameters]
    second = [np.zeros_like(each) for each in parameters]
    for step in range(1, MLP_STEPS + 1):
        gradients = _gradients(parameters[:3], parameters[3:], inputs, targets)
        rate = MLP_RATE * 0.5 * (1 + exact.cos_sin(math.pi * step / MLP_STEPS)[0])
        for each, slope, m, v in zip(parameters, gradients, first, second, strict=True):
            m += 0.1 * (slope - m)
            v += 0.001 * (slope * slope - v)
            first_share, second_share = 1 - exact.power(0.9, step), 1 - exact.power(0.999, step)
            each -= rate * (m / first_share) / (np.sqrt(v / second_share) + 1e-8)
    return EgoMlp(mean, scale, tuple(parameters[:3]), tuple(parameters[3:]))


def _gradients(
    weights: list[np.ndarray], biases: list[np.ndarray], inputs: np.ndarray, targets: np.ndarray
) -> list[np.ndarray]:
    layers = [inputs]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        values = exact.product(layers[-1], weight) + bias
        layers.append(np.maximum(values, 0.0) if layer + 1 < len(weights) else values)
    slope = np.sign(layers[-1] - targets) / targets.size
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for layer in range(len(weights) - 1, -1, -1):
        found.append((exact.product(layers[layer].T, slope), slope.sum(axis=0)))
        if layer:
            slope = exact.product(slope, weights[layer].T) * (layers[layer] > 0)
    found.reverse()
    return [each for each, _ in found] + [each for _, each in found]


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

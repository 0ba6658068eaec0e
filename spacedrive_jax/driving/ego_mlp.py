"""A planner that sees nothing but the ego vehicle's own motion (the kind of AD-MLP, arXiv 2305.10430).

On nuScenes' L2 it is as good as the best, on Bench2Drive its driving score is 18: a model must beat it where
it drives.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.constants import NUM_WAYPOINTS
from spacedrive_jax.data.schema import Record
from spacedrive_jax.driving.driver import Plan
from spacedrive_jax.errors import DataError
from spacedrive_jax.world.world import World

HIDDEN = 64
STEPS = 1500
RATE = 3e-3
NUM_COMMANDS = 8


@dataclasses.dataclass(frozen=True)
class EgoMlp:
    """Two hidden layers; inputs are scaled to mean 0 and deviation 1."""

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
    sizes = (inputs.shape[1], HIDDEN, HIDDEN, 2 * NUM_WAYPOINTS)
    weights = [rng.normal(0, np.sqrt(2 / i), (i, o)) for i, o in itertools.pairwise(sizes)]
    biases = [np.zeros(o) for o in sizes[1:]]
    biases[-1] = targets.mean(axis=0)
    weights[-1] *= 0.1
    parameters = [*weights, *biases]
    first = [np.zeros_like(each) for each in parameters]
    second = [np.zeros_like(each) for each in parameters]
    for step in range(1, STEPS + 1):
        gradients = _gradients(parameters[:3], parameters[3:], inputs, targets)
        rate = RATE * 0.5 * (1 + exact.cos_sin(math.pi * step / STEPS)[0])
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

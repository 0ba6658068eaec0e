"""How well a point can be read back from its encoding: nothing but phi, noise and a reader.

Points are drawn around the ego vehicle and encoded by the run's encoder phi; noise stands for the visual
token that the encoding is added to; the sum is brought to unit root mean square, as the language model's
norms do, and the run's own decoder psi reads metres from it. What the config lets learn (decoder, `mlp`
encoder, frequencies, alpha) is trained together, on fresh points every step. No language model takes part:
this measures how far the encoding itself resolves metres, the best that a model could do that hands it on
unchanged.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from spacedrive_jax.bounds import COUNT, FROM_ZERO, POSITIVE, Bounds, check_bounds
from spacedrive_jax.config import Config
from spacedrive_jax.constants import NUM_WAYPOINTS
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.models.coordinate_decoder import GridDecoder, make_decoder
from spacedrive_jax.models.coordinate_encoder import CoordinateEncoder, rotate_features

BLOCKS = 40
"""Groups of test points that stand for scenes in the bootstrap."""
BINS = (0.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0)
"""Metres; bounds of the distances that errors are reported by."""
Z_RANGE = (-1.0, 3.0)
"""Metres: heights of the points, as of surfaces that cameras see."""


@dataclasses.dataclass(frozen=True)
class Readout:
    """How points are read back."""

    noise: float = 0.0
    """Standard deviation, per channel, of what the encoding is added to."""
    relative: bool = True
    """Every encoding is brought to unit root mean square before, so that noise is a share of it and all kinds
    speak equally loud; False leaves it at its scale alpha, and a standard deviation of 1 is a visual token as
    the language model's norms leave it."""
    steps: int = 1500
    batch_size: int = 512
    learning_rate: float = 3e-3
    test_points: int = 4000
    farthest: float = 50.0
    """Metres; points are even over distance and direction."""

    BOUNDS: ClassVar[Bounds] = {
        "noise": FROM_ZERO,
        "steps": COUNT,
        "batch_size": COUNT,
        "learning_rate": POSITIVE,
        "test_points": COUNT,
        "farthest": POSITIVE,
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "readout")


class Reader(nnx.Module):
    """phi, and the decoder psi behind it."""

    def __init__(self, config: Config, *, relative: bool, rngs: nnx.Rngs) -> None:
        """Args: the run (encoder, decoder and width count), see `Readout`, random streams (`params`)."""
        self.relative = relative
        self.width = config.model.vlm.decoder.hidden_size
        self.rotates = config.model.visual_positions == "rotate"
        self.encoder = CoordinateEncoder(config.model.encoder, self.width, rngs=rngs)
        self.decoder = make_decoder(config.model.decoder, self.width, NUM_WAYPOINTS, rngs=rngs)
        # What a rotary encoding turns: one vector for all points.
        self.carrier = jax.random.normal(rngs.params(), (self.width,))

    def __call__(self, points: Float[Array, "B 3"], noise: Float[Array, "B D"]) -> Float[Array, "B 2"]:
        """What is read back, metres, of points under noise."""
        hidden = self.hidden(points, noise)
        if isinstance(self.decoder, GridDecoder):
            return self.decoder(hidden, self.encoder)[..., :2]
        return self.decoder(hidden)[..., :2]

    def hidden(self, points: Float[Array, "B 3"], noise: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """What is read from: encodings under noise, at unit root mean square."""
        if self.rotates:
            carrier = jnp.broadcast_to(self.carrier, noise.shape)
            encoded = self.encoder.scale * rotate_features(carrier, points)
        else:
            encoded = self.encoder(points)
        return _normalized((_normalized(encoded) if self.relative else encoded) + noise)


def _normalized(features: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """At unit root mean square, each."""
    return features * jax.lax.rsqrt(jnp.mean(jnp.square(features), axis=-1, keepdims=True) + 1e-12)


def draw_points(key: Array, count: int, farthest: float) -> Float[Array, "B 3"]:
    """Points around the ego vehicle, even over distance, direction and height, metres."""
    far, turn, height = jax.random.split(key, 3)
    distance = jax.random.uniform(far, (count,), maxval=farthest)
    angle = jax.random.uniform(turn, (count,), maxval=2 * jnp.pi)
    z = jax.random.uniform(height, (count,), minval=Z_RANGE[0], maxval=Z_RANGE[1])
    return jnp.stack([distance * jnp.cos(angle), distance * jnp.sin(angle), z], axis=-1)


def _draw(
    readout: Readout, key: Array, count: int, width: int
) -> tuple[Float[Array, "B 3"], Float[Array, "B D"]]:
    """Points, and the noise under which they are read."""
    where, disturb = jax.random.split(key)
    points = draw_points(where, count, readout.farthest)
    return points, readout.noise * jax.random.normal(disturb, (count, width))


def read_back(config: Config, readout: Readout) -> dict[str, Any]:
    """Trains a reader and measures it on points that it has not seen.

    Args:
        config: the run: encoder, decoder, width and seed count.
        readout: how.

    Returns:
        `measures`: `error`, the mean distance between a point and what is read, metres (x, y), and `alpha`
        afterwards; `groups`: metric to group of test points to [sum, count]; `curves`: the error by distance.

    Raises:
        SpaceDriveError: what is read is not finite.
    """
    seed = config.train.seed
    graph, trained, rest = nnx.split(
        Reader(config, relative=readout.relative, rngs=nnx.Rngs(seed)), nnx.Param, ...
    )
    learns = bool(jax.tree.leaves(trained))
    schedule = optax.cosine_decay_schedule(readout.learning_rate, readout.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    # Everything that differs from seed to seed is an argument: the seeds of a cell share one program.
    def errors(trained: nnx.State, rest: nnx.State, key: Array, count: int) -> tuple[Array, Array]:
        reader = nnx.merge(graph, trained, rest)
        points, noise = _draw(readout, key, count, reader.width)
        return points, reader(points, noise) - points[:, :2]

    def loss(trained: nnx.State, rest: nnx.State, key: Array) -> Array:
        _, error = errors(trained, rest, key, readout.batch_size)
        return jnp.mean(optax.huber_loss(error, delta=config.train.huber_delta))

    @jax.jit
    def fit(trained: nnx.State, rest: nnx.State, key: Array) -> nnx.State:
        def step(carry: tuple[nnx.State, Any], number: Array) -> tuple[tuple[nnx.State, Any], None]:
            now, state = carry
            gradient = jax.grad(loss)(now, rest, jax.random.fold_in(key, number))
            updates, state = optimizer.update(gradient, state, now)
            return (optax.apply_updates(now, updates), state), None

        start = (trained, optimizer.init(trained))
        (trained, _), _ = jax.lax.scan(step, start, jnp.arange(readout.steps))
        return trained

    # Points to train on differ from seed to seed; those to test on are the same for all runs, so that they
    # can be compared point by point.
    if config.model.decoder.kind == "linear" and not _encoder_learns(config, readout):
        trained = _solved(graph, trained, rest, readout, jax.random.key(seed))
    elif learns:
        trained = fit(trained, rest, jax.random.key(seed))
    points, error = jax.jit(errors, static_argnums=3)(
        trained, rest, jax.random.key(20251205), readout.test_points
    )
    distance, off = (
        np.asarray(jnp.linalg.norm(each[:, :2], axis=-1), np.float64) for each in (points, error)
    )
    if not np.isfinite(off).all():
        raise SpaceDriveError(
            f"{config.name}: what is read back is no number; look at model.encoder.base "
            f"{config.model.encoder.base} and readout.learning_rate {readout.learning_rate}"
        )
    model = nnx.merge(graph, trained, rest)
    return {
        "measures": {"error": float(off.mean()), "alpha": float(model.encoder.scale)},
        "groups": {"error": _groups(off)},
        "curves": {"error by distance, m": _by_distance(distance, off)},
    }


def _encoder_learns(config: Config, readout: Readout) -> bool:
    encoder = config.model.encoder
    scaled = encoder.learnable_alpha and not readout.relative
    return encoder.kind == "mlp" or encoder.learnable_frequencies or scaled


RIDGE = 1e-6
"""Of the mean square of a feature."""


def _solved(
    graph: nnx.GraphDef, trained: nnx.State, rest: nnx.State, readout: Readout, key: Array
) -> nnx.State:
    """A linear reader solved as ridge regression on as many points as training would have drawn, up to
    50,000: gradient steps would measure how badly conditioned it is, not what it can read.
    """
    count = min(readout.steps * readout.batch_size, 50_000)
    reader = nnx.merge(graph, trained, rest)
    points, noise = _draw(readout, key, count, reader.width)
    features = np.asarray(reader.hidden(points, noise), np.float64)
    features = np.concatenate([features, np.ones((count, 1))], axis=1)
    gram = features.T @ features
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    solution = np.linalg.solve(gram, features.T @ np.asarray(points, np.float64))
    reader.decoder.output.kernel.set_value(jnp.asarray(solution[:-1], jnp.float32))
    reader.decoder.output.bias.set_value(jnp.asarray(solution[-1], jnp.float32))
    return nnx.split(reader, nnx.Param, ...)[1]


def _groups(values: Float[np.ndarray, " K"]) -> Mapping[str, list[float]]:
    parts = np.array_split(values, BLOCKS)
    return {f"block-{number:02d}": [float(part.sum()), len(part)] for number, part in enumerate(parts)}


def _by_distance(
    distance: Float[np.ndarray, " K"], values: Float[np.ndarray, " K"]
) -> list[list[float | None]]:
    """Pairs of a bin's middle and its mean error."""
    found: list[list[float | None]] = []
    for low, high in itertools.pairwise(BINS):
        inside = (distance >= low) & (distance < high)
        found.append([(low + high) / 2, float(values[inside].mean()) if inside.any() else None])
    return found

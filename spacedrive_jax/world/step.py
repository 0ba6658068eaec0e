"""The traffic, stepped: every mover decides from where everybody is, then everybody moves.

The ego vehicle either follows its own route like all others (`EgoBody` None: recordings) or is a body that
somebody else steers; the others then react to its true box, wherever it stands.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.world.cast import Cast, CastOnRoutes, Tracks
from spacedrive_jax.world.decisions import Moment
from spacedrive_jax.world.paths import overlapping_pairs
from spacedrive_jax.world.town import Town
from spacedrive_jax.world.traffic import TIME_STEP, Motion

OFF_ROUTE = 6.0
"""Metres beside its route from which on a steered ego vehicle is seen by its box alone."""


@dataclasses.dataclass(frozen=True)
class EgoBody:
    """An ego vehicle that is steered from outside, as the others see it."""

    pose: tuple[float, float, float]
    """x, y, heading of its rear axle, global frame."""
    speed: float
    acceleration: float


@dataclasses.dataclass(frozen=True)
class TrafficState:
    """Everybody at one instant. Plain numbers: it can be kept, copied, written to JSON and gone on from."""

    step: int
    """Time steps since the start."""
    s: Float[np.ndarray, "A"]
    """Arc length of every mover on its route; of a steered ego vehicle, that of the nearest point."""
    speed: Float[np.ndarray, "A"]
    acceleration: Float[np.ndarray, "A"]
    """Decided now and held until the next step, m/s^2."""
    since: Float[np.ndarray, "A"]
    """When each mover's part was triggered, seconds; inf where it has none or waits."""

    @property
    def time(self) -> float:
        """Seconds since the start."""
        return self.step * TIME_STEP


class Traffic(CastOnRoutes):
    """A cast that moves."""

    def start(self, ego: EgoBody | None = None) -> TrafficState:
        """Everybody at time 0.

        Args:
            ego: where the steered ego vehicle stands; None lets it follow its own route.
        """
        s = np.array([mover.start for mover in self.movers])
        speed = np.array([mover.speed for mover in self.movers])
        since = np.full(len(self.movers), np.inf)
        return self._decided(0, s, speed, since, ego)

    def step(self, state: TrafficState, ego: EgoBody | None = None) -> TrafficState:
        """Everybody one time step later.

        Args:
            state: everybody now.
            ego: where the steered ego vehicle is then; None lets it follow its own route.
        """
        acceleration = state.acceleration
        s = state.s + state.speed * TIME_STEP + 0.5 * acceleration * TIME_STEP**2
        speed = np.maximum(state.speed + acceleration * TIME_STEP, 0.0)
        if ego is not None:
            s[0] = state.s[0]
        return self._decided(state.step + 1, s, speed, state.since, ego)

    def rejoin(self, state: TrafficState, acceleration: float) -> TrafficState:
        """The same instant with the ego vehicle back on its route, to drive it by itself from here.

        Args:
            state: of a steered ego vehicle.
            acceleration: kept for its first time step, m/s^2; its driver decides from the next on.
        """
        held = state.acceleration.copy()
        held[0] = max(acceleration, -float(state.speed[0]) / TIME_STEP)
        return dataclasses.replace(state, acceleration=held)

    def poses(self, state: TrafficState, ego: EgoBody | None = None) -> Float[np.ndarray, "R 3"]:
        """x, y, heading of every box centre: movers first, then obstacles."""
        return self._poses(state.s, ego)

    def _poses(self, s: Float[np.ndarray, "A"], ego: EgoBody | None) -> Float[np.ndarray, "R 3"]:
        poses = np.concatenate([self.tracks.poses(s), self.still])
        if ego is not None:
            x, y, yaw = ego.pose
            ahead = self.movers[0].reference_to_centre
            cos, sin = exact.cos_sin(yaw)
            poses[0] = x + ahead * cos, y + ahead * sin, yaw
        return poses

    def _decided(
        self,
        step: int,
        s: Float[np.ndarray, "A"],
        speed: Float[np.ndarray, "A"],
        since: Float[np.ndarray, "A"],
        ego: EgoBody | None,
    ) -> TrafficState:
        off_route = False
        if ego is not None:
            s[0], aside = self.movers[0].route.project(np.array(ego.pose[:2]), float(s[0]))
            speed[0] = ego.speed
            off_route = abs(aside) > OFF_ROUTE
        poses = self._poses(s, ego)
        if self.parts:
            since = self._triggered(step * TIME_STEP, poses[0, :2], float(speed[0]), since)
        moment = Moment(self, step * TIME_STEP, s, speed, since, poses, off_route)
        first = 0 if ego is None else 1
        wanted = moment.decide(first)
        # Stop exactly at zero within the step, so that speed and distance stay consistent.
        acceleration = np.maximum(wanted, -speed[first:] / TIME_STEP)
        if ego is not None:
            acceleration = np.concatenate([[ego.acceleration], acceleration])
        return TrafficState(step, s, speed, acceleration, since)

    def _triggered(
        self, time: float, place: Float[np.ndarray, "2"], speed: float, since: Float[np.ndarray, "A"]
    ) -> Float[np.ndarray, "A"]:
        """`since` with the parts that begin now."""
        since = since.copy()
        for i in self.parts:
            part = self.movers[i].part
            assert part is not None
            if np.isinf(since[i]) and part.trigger.reached(place, speed, time):
                since[i] = time
        return since


def simulate(town: Town, cast: Cast, duration: float) -> list[Motion]:
    """Simulates a scene.

    Args:
        town: the road network.
        cast: who takes part.
        duration: seconds.

    Returns:
        One motion per mover, sampled every `TIME_STEP` seconds from 0 to at least `duration`.
    """
    whole = Traffic(town, cast)
    states = [whole.start()]
    for _ in range(int(np.ceil(duration / TIME_STEP)) + 1):
        states.append(whole.step(states[-1]))
    history = np.stack([[state.s, state.speed, state.acceleration] for state in states], axis=1)
    return [Motion(*history[:, :, i]) for i in range(len(cast.movers))]


def first_collisions(cast: Cast, motions: list[Motion], duration: float, clearance: float = 0.05) -> set[str]:
    """Keys of everybody (never the ego vehicle) to leave out so that nobody overlaps anybody.

    Args:
        cast: who took part.
        motions: the simulated motions.
        duration: seconds to check, every time step.
        clearance: metres added around every footprint.
    """
    moving, still = cast.movers, cast.obstacles
    sizes = [mover.size[:2] for mover in moving] + [item.size[:2] for item in still]
    half = np.array(sizes).reshape(-1, 2) / 2 + clearance
    keys = [mover.key for mover in moving] + [item.key for item in still]
    fixed = np.array([item.pose for item in still]).reshape(-1, 3)
    rank = np.arange(len(keys))  # later in the cast gives way
    removed: set[str] = set()
    tracks = Tracks(moving)
    for step in range(int(duration / TIME_STEP)):
        moved = tracks.poses(np.array([motion.s[step] for motion in motions]))
        hits = overlapping_pairs(np.concatenate([moved, fixed]), half)
        for a, b in hits:
            if keys[a] not in removed and keys[b] not in removed:
                removed.add(keys[max(rank[a], rank[b])])
    return removed

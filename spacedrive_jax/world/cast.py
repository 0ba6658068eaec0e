"""Who takes part in a scene, and what of them does not change while they move."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from spacedrive_jax import exact
from spacedrive_jax.world import traffic
from spacedrive_jax.world.town import Town
from spacedrive_jax.world.traffic import Gate, Mover, Obstacle, Signals, Zebra


@dataclasses.dataclass(frozen=True)
class Cast:
    """Who takes part in a scene. Movers come first in all arrays, the ego vehicle first of all."""

    movers: tuple[Mover, ...]
    obstacles: tuple[Obstacle, ...]
    signals: Signals


class Tracks:
    """Box centre poses of many movers at once; routes are evenly spaced, so a pose is two table rows."""

    def __init__(self, movers: tuple[Mover, ...]) -> None:
        routes = [mover.route for mover in movers]
        counts = np.array([len(route.points) for route in routes])
        self.first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.last = counts - 1.0
        self.spacing = np.array([route.lengths[-1] for route in routes]) / self.last
        self.table = np.concatenate([np.column_stack([r.points, r.headings]) for r in routes])
        self.x, self.y = np.ascontiguousarray(self.table[:, 0]), np.ascontiguousarray(self.table[:, 1])
        self.lengths = np.concatenate([route.lengths for route in routes])
        self.ends = np.array([route.lengths[-1] for route in routes])
        self.ahead = np.array([mover.reference_to_centre for mover in movers])

    def poses(self, s: Float[np.ndarray, "A"]) -> Float[np.ndarray, "A 3"]:
        """x, y, heading of every box centre at arc lengths `s`."""
        position = np.clip(s / self.spacing, 0.0, self.last - 1e-6)
        low = position.astype(int)
        rows = self.first + low
        result = self.table[rows] + (position - low)[:, None] * (self.table[rows + 1] - self.table[rows])
        cos, sin = exact.cos_sin(result[:, 2])
        result[:, 0] += self.ahead * cos
        result[:, 1] += self.ahead * sin
        return result


class CastOnRoutes:
    """A cast in its town, as tables: all that can be worked out before anybody moves."""

    def __init__(self, town: Town, cast: Cast) -> None:
        self.town, self.cast = town, cast
        self.movers = cast.movers
        self.profiles = [traffic.speed_limit_profile(mover.route) for mover in self.movers]
        sizes = [mover.size[:2] for mover in self.movers] + [item.size[:2] for item in cast.obstacles]
        self.half = np.array(sizes).reshape(-1, 2) / 2
        self.still = np.array([item.pose for item in cast.obstacles]).reshape(-1, 3)
        self.tracks = Tracks(self.movers)
        self.on_foot = np.array([m.pedestrian for m in self.movers] + [False] * len(self.still))
        self.radii = exact.norm(self.half)
        count = len(self.movers)
        # A corridor begins at the box centre; 2 m more than its length for the way there being no straight
        # line. Whoever is further off than that from the centre cannot stand in it.
        self.reach = np.where(self.on_foot[:count], 4.0, traffic.LOOKAHEAD)
        """Metres ahead of its front that each mover looks."""
        reach = self.reach + 2.8
        reach = reach + self.half[:count, 0] + self.half[:count, 1]
        self.farthest = (reach[:, None] + self.radii) ** 2
        """Squared metres between two box centres from which on nobody has to look, movers first."""
        self.noticed = ~np.eye(count, len(self.half), dtype=bool)
        """Whom each mover looks at when near: all but itself; people on foot do not mind each other."""
        self.noticed &= ~(self.on_foot[:count, None] & self.on_foot)
        self.walkers: dict[int, list[int]] = {}
        """Movers who walk over each crossing."""
        self.arrivals: dict[int, list[tuple[int, Zebra]]] = {}
        """Vehicles whose routes lead over each crossing, and where."""
        self.entries: dict[int, list[tuple[int, Gate]]] = {}
        """Vehicles whose routes lead over each signalised junction, and where."""
        for i, mover in enumerate(self.movers):
            if mover.crossing >= 0:
                self.walkers.setdefault(mover.crossing, []).append(i)
            for zebra in mover.route.zebras:
                self.arrivals.setdefault(zebra.crossing, []).append((i, zebra))
            for gate in mover.route.gates:
                self.entries.setdefault(gate.junction, []).append((i, gate))
        self.gates = [(i, gate) for i, mover in enumerate(self.movers) for gate in mover.route.gates]
        self.zebras = [(i, zebra) for i, mover in enumerate(self.movers) for zebra in mover.route.zebras]
        self.parts = [i for i, mover in enumerate(self.movers) if mover.part is not None]
        self.idm_parameters = np.array([mover.idm_parameters for mover in self.movers])
        self.crosses = np.array([mover.crossing >= 0 for mover in self.movers])
        """Who walks over a crossing."""
        self.conflicts: dict[tuple[int, Zebra, int], float] = {}
        """How far along a walker's route a vehicle's path lies, by vehicle, zebra and walker."""

    def close(self, x: Float[np.ndarray, "R"], y: Float[np.ndarray, "R"]) -> Bool[np.ndarray, "A R"]:
        """Whom each mover has to look at: all who could stand in its corridor, given the box centres."""
        count = len(self.movers)
        squared = (x[:count, None] - x) ** 2 + (y[:count, None] - y) ** 2
        return (squared < self.farthest) & self.noticed

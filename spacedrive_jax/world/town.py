"""The road network of one synthetic town: roads, lanes, junctions, crossings and the drivable surface.

A town is a jittered lattice of junctions. Every junction has its own orientation and its arms leave at
right angles, so the Bezier roads between junctions bend with many radii; removed edges make T junctions
and, where two arms are left, sharp bends.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import shapely
from jaxtyping import Float
from shapely.geometry import LineString, Polygon

from spacedrive_jax import exact
from spacedrive_jax.world import paths

LANE_WIDTH = 3.5
PARKING_WIDTH = 2.4
SIDEWALK_WIDTH = 3.0
CROSSING_LENGTH = 3.0
CROSSING_SETBACK = 1.0
"""From the junction edge to the near edge of the crossing, metres."""
STOP_SETBACK = CROSSING_SETBACK + CROSSING_LENGTH + 1.2
"""From the junction edge back to the stop line, metres."""

POST_SETBACK = 0.8
"""From the kerb to the post of a sign or of a light, metres."""

MARGIN = 110.0
TOWN_EDGE = MARGIN * 2 + 500.0
"""Width and height of the square map canvas, metres."""

RIGHT_HAND = {"boston-seaport": True, "singapore-onenorth": False}
"""Traffic side of the two locations, as in the real cities."""
LOCATIONS = tuple(RIGHT_HAND)
TEST_TOWN = "pittsburgh-hazelwood"
"""A town of another geometry, in which no data set is recorded: only drives are scored there."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The lattice that a town is made from."""

    size: int = 5
    """Junctions a side."""
    shift: float = 17.0
    """Metres by which junctions stand beside the lattice's points, at most."""
    turn: float = 16.0
    """Degrees by which junctions are turned, at most: how much roads bend."""

    @property
    def spacing(self) -> float:
        """Metres between the lattice's points."""
        return (TOWN_EDGE - 2 * MARGIN) / (self.size - 1)


GRIDS = {TEST_TOWN: Grid(4, 26.0, 27.0)}
"""Of the towns that differ from the default."""


@dataclasses.dataclass(frozen=True)
class Road:
    """A road between two junctions; its centre line runs from junction edge to junction edge."""

    index: int
    start: tuple[int, int]
    """Junction index and arm (0 to 3)."""
    end: tuple[int, int]
    centre: Float[np.ndarray, "K 2"]
    lanes: int
    """Lanes per direction."""
    parking: float
    """Width of the parking strip on each side, metres; 0 without one."""

    @property
    def half_width(self) -> float:
        """From the centre line to the kerb, metres."""
        return self.lanes * LANE_WIDTH + self.parking


@dataclasses.dataclass(frozen=True)
class Lane:
    """A lane of a road, or a lane connector through a junction."""

    key: str
    centre: Float[np.ndarray, "K 2"]
    road: int | None
    """None for a connector."""
    junction: int
    """The junction this lane leads to (a lane) or passes (a connector)."""
    arm: int
    """Arm of that junction by which the vehicle arrives."""
    index: int
    """0 is next to the centre line."""
    turn: str
    """`left`, `right` or `straight` for a connector, empty for a lane."""
    successors: tuple[str, ...]

    @property
    def length(self) -> float:
        """Along the centre, metres."""
        return float(paths.arc_lengths(self.centre)[-1])


@dataclasses.dataclass(frozen=True)
class Junction:
    """Where roads meet; `radius` is the distance of its edge from the centre along each arm."""

    index: int
    centre: Float[np.ndarray, "2"]
    heading: float
    radius: float
    arms: tuple[int, ...]

    @property
    def signalised(self) -> bool:
        """Traffic lights stand where three or four arms meet; two arms are only a bend."""
        return len(self.arms) > 2

    def arm_heading(self, arm: int) -> float:
        """Outward direction of an arm, radians."""
        return self.heading + arm * np.pi / 2


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A zebra crossing. `walk` holds its two kerb-side ends; `junction` and `arm` are -1 in mid-block."""

    polygon: Float[np.ndarray, "4 2"]
    walk: Float[np.ndarray, "2 2"]
    road: int
    junction: int
    arm: int


@dataclasses.dataclass(frozen=True)
class Town:
    """A whole map in global metres: x right (east), y up (north), origin in the lower left corner."""

    location: str
    right_hand: bool
    roads: tuple[Road, ...]
    lanes: dict[str, Lane]
    junctions: tuple[Junction, ...]
    crossings: tuple[Crossing, ...]
    drivable: shapely.Geometry
    sidewalk: shapely.Geometry

    @property
    def side(self) -> float:
        """Sign of the left normal on which traffic drives: -1 right-hand, +1 left-hand."""
        return -1.0 if self.right_hand else 1.0


def stop_sign_pose(town: Town, junction: int, arm: int) -> tuple[float, float, float]:
    """Where a stop sign of a junction stands: at the kerb beside the stop line.

    Returns:
        x, y and the direction to which it shows.
    """
    place = town.junctions[junction]
    road = next(road for road in town.roads if (junction, arm) in (road.start, road.end))
    outward = np.array(exact.cos_sin(place.arm_heading(arm)))
    # To the left of who arrives.
    left = np.array([outward[1], -outward[0]])
    x, y = (
        place.centre
        + outward * (place.radius + STOP_SETBACK)
        + left * town.side * (road.half_width + POST_SETBACK)
    ).tolist()
    return x, y, place.arm_heading(arm)


def merges(town: Town, connector: str) -> bool:
    """Whether a connector leads two lanes into one, where vehicles would have to negotiate."""
    lane = town.lanes[connector]
    if lane.turn != "straight" and town.junctions[lane.junction].signalised:
        return False
    return town.lanes[lane.successors[0]].index != lane.index


def next_lane(town: Town, key: str, rng: np.random.Generator) -> str:
    """A random successor, one without a merge where there is a choice."""
    successors = town.lanes[key].successors
    easy = [name for name in successors if town.lanes[name].road is not None or not merges(town, name)]
    choices = easy or successors
    return choices[int(rng.integers(len(choices)))]


def build_town(location: str, rng: np.random.Generator) -> Town:
    """Builds the town of a location.

    Args:
        location: one of `LOCATIONS`, or `TEST_TOWN`; decides the traffic side and the geometry.
        rng: the only source of randomness.
    """
    right_hand, grid = RIGHT_HAND.get(location, True), GRIDS.get(location, Grid())
    size = grid.size
    count = size * size
    lattice = np.array([(i % size, i // size) for i in range(count)], dtype=np.float64)
    centres = MARGIN + grid.spacing * lattice + rng.uniform(-grid.shift, grid.shift, (count, 2))
    turns = np.radians(rng.uniform(-grid.turn, grid.turn, count))
    lane_counts = {"row": rng.choice([1, 1, 2], size), "column": rng.choice([1, 1, 2], size)}
    edges = _choose_edges(size, rng)

    def lanes_of(a: int, arm: int) -> int:
        """Lanes per direction of the road that leaves a junction to the right (0) or upwards (1)."""
        return int(lane_counts["row"][a // size] if arm == 0 else lane_counts["column"][a % size])

    lanes_at = np.ones(count, dtype=int)
    for (a, arm), b in edges.items():
        lanes = lanes_of(a, arm)
        lanes_at[[a, b]] = np.maximum(lanes_at[[a, b]], lanes)
    radii = lanes_at * LANE_WIDTH + PARKING_WIDTH + 8.0

    arms: dict[int, list[int]] = {i: [] for i in range(count)}
    roads = []
    for index, ((a, arm), b) in enumerate(edges.items()):
        heading_a = turns[a] + arm * np.pi / 2
        heading_b = turns[b] + arm * np.pi / 2
        start = centres[a] + radii[a] * np.array(exact.cos_sin(heading_a))
        end = centres[b] - radii[b] * np.array(exact.cos_sin(heading_b))
        lanes = lanes_of(a, arm)
        curve = paths.resample(paths.bezier(start, heading_a, end, heading_b, 0.38), 1.0)
        parking = PARKING_WIDTH if rng.random() < 0.6 else 0.0
        roads.append(Road(index, (a, arm), (b, (arm + 2) % 4), curve, lanes, parking))
        arms[a].append(arm)
        arms[b].append((arm + 2) % 4)
    junctions = tuple(
        Junction(i, centres[i], float(turns[i]), float(radii[i]), tuple(sorted(arms[i])))
        for i in range(count)
    )
    side = -1.0 if right_hand else 1.0
    lanes_by_key = _build_lanes(roads, junctions, side)
    crossings = _build_crossings(roads, junctions, rng)
    drivable = _drivable_surface(roads, junctions)
    sidewalk = drivable.buffer(SIDEWALK_WIDTH).difference(drivable)
    return Town(
        location, right_hand, tuple(roads), lanes_by_key, junctions, tuple(crossings), drivable, sidewalk
    )


def _choose_edges(size: int, rng: np.random.Generator) -> dict[tuple[int, int], int]:
    """Lattice edges as {(junction, arm 0 or 1): neighbour}; a few removed, every junction keeps two."""
    edges: dict[tuple[int, int], int] = {}
    for i in range(size * size):
        if i % size < size - 1:
            edges[(i, 0)] = i + 1
        if i // size < size - 1:
            edges[(i, 1)] = i + size
    degree = np.zeros(size * size, dtype=int)
    for (a, _), b in edges.items():
        degree[[a, b]] += 1
    keys = list(edges)
    removed = 0
    for position in rng.permutation(len(keys)):
        a, arm = keys[position]
        b = edges[(a, arm)]
        if removed < size + 2 and degree[a] > 2 and degree[b] > 2:
            degree[[a, b]] -= 1
            del edges[(a, arm)]
            removed += 1
    return edges


def lane_key(road: int, forward: bool, index: int) -> str:
    """Name of a road lane; `forward` lanes run along the road's centre line."""
    return f"road{road:03d}-{'forward' if forward else 'backward'}-{index}"


def _build_lanes(roads: list[Road], junctions: tuple[Junction, ...], side: float) -> dict[str, Lane]:
    arriving: dict[tuple[int, int], list[str]] = {}
    leaving: dict[tuple[int, int], list[str]] = {}
    lanes: dict[str, Lane] = {}
    for road in roads:
        for forward in (True, False):
            centre = road.centre if forward else road.centre[::-1]
            origin, target = (road.start, road.end) if forward else (road.end, road.start)
            for index in range(road.lanes):
                key = lane_key(road.index, forward, index)
                line = paths.offset(centre, side * (index + 0.5) * LANE_WIDTH)
                lanes[key] = Lane(key, line, road.index, target[0], target[1], index, "", ())
                arriving.setdefault(target, []).append(key)
                leaving.setdefault(origin, []).append(key)

    successors: dict[str, list[str]] = {key: [] for key in lanes}
    connectors: dict[str, Lane] = {}
    for junction in junctions:
        for arm_in in junction.arms:
            for arm_out in junction.arms:
                if arm_in == arm_out:
                    continue
                entries, exits = arriving[(junction.index, arm_in)], leaving[(junction.index, arm_out)]
                turn = {1: "right", 2: "straight", 3: "left"}[(arm_out - arm_in) % 4]
                if turn == "straight" or not junction.signalised:
                    pairs = [(i, min(i, len(exits) - 1)) for i in range(len(entries))]
                elif (turn == "right") == (side < 0):  # the turn that stays on the traffic side
                    pairs = [(len(entries) - 1, len(exits) - 1)]
                else:
                    pairs = [(0, 0)]
                for i, j in pairs:
                    key = f"junction{junction.index:02d}-{arm_in}{arm_out}-{i}"
                    first, last = lanes[entries[i]].centre, lanes[exits[j]].centre
                    heading_in = junction.arm_heading(arm_in) + np.pi
                    line = paths.bezier(first[-1], heading_in, last[0], junction.arm_heading(arm_out), 0.39)
                    connectors[key] = Lane(key, line, None, junction.index, arm_in, i, turn, (exits[j],))
                    successors[entries[i]].append(key)
    for key, names in successors.items():
        lanes[key] = dataclasses.replace(lanes[key], successors=tuple(names))
    return lanes | connectors


def _build_crossings(
    roads: list[Road], junctions: tuple[Junction, ...], rng: np.random.Generator
) -> list[Crossing]:
    crossings = []
    for road in roads:
        lengths = paths.arc_lengths(road.centre)
        total = float(lengths[-1])
        places = [
            (CROSSING_SETBACK + CROSSING_LENGTH / 2, *road.start),
            (total - CROSSING_SETBACK - CROSSING_LENGTH / 2, *road.end),
        ]
        places = [place for place in places if junctions[place[1]].signalised]
        if rng.random() < 0.45 and total > 60.0:
            places.append((total * rng.uniform(0.42, 0.58), -1, -1))
        normals = paths.left_normals(road.centre)
        for position, junction, arm in places:
            nearest = int(np.argmin(np.abs(lengths - position)))
            centre, across = road.centre[nearest], normals[nearest]
            along = np.array([across[1], -across[0]]) * CROSSING_LENGTH / 2
            reach = across * road.half_width
            polygon = np.stack(
                [
                    centre + reach + along,
                    centre + reach - along,
                    centre - reach - along,
                    centre - reach + along,
                ]
            )
            kerb = across * (road.half_width + 0.9)
            walk = np.stack([centre + kerb, centre - kerb])
            crossings.append(Crossing(polygon, walk, road.index, junction, arm))
    return crossings


def _drivable_surface(roads: list[Road], junctions: tuple[Junction, ...]) -> shapely.Geometry:
    """Union of roads and junction arms with rounded kerbs in the corners."""
    pieces = [LineString(road.centre).buffer(road.half_width, cap_style="flat") for road in roads]
    arm_ends: dict[int, list[tuple[int, Road, Float[np.ndarray, "2"]]]] = {}
    for road in roads:
        arm_ends.setdefault(road.start[0], []).append((road.start[1], road, road.centre[0]))
        arm_ends.setdefault(road.end[0], []).append((road.end[1], road, road.centre[-1]))
    for junction in junctions:
        ends = arm_ends[junction.index]
        if junction.signalised:
            pieces.append(Polygon(junction.centre + _square(junction.radius * 0.45, junction.heading)))
            for _, road, end in ends:
                pieces.append(LineString([junction.centre, end]).buffer(road.half_width, cap_style="flat"))
        else:  # a bend: one curved road, as wide as the wider of the two
            (arm_in, first, start), (arm_out, second, end) = ends
            inward = junction.arm_heading(arm_in) + np.pi
            curve = paths.bezier(start, inward, end, junction.arm_heading(arm_out), 0.39)
            width = max(first.half_width, second.half_width)
            pieces.append(LineString(curve).buffer(width, cap_style="flat"))
    surface = shapely.union_all(pieces).buffer(7.0).buffer(-7.0).simplify(0.03)
    return shapely.make_valid(surface)


def _square(half: float, heading: float) -> Float[np.ndarray, "4 2"]:
    corners = half * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=np.float64)
    cos, sin = exact.cos_sin(heading)
    return exact.rotate(corners, np.array([[cos, -sin], [sin, cos]]))

"""Closed-loop scores of Bench2Drive from the files that its leaderboard evaluator and its agents write.

Driving score, success rate and efficiency follow the benchmark's own tools (Thinklab-SJTU/Bench2Drive,
`tools/`); the number of routes in the set is the denominator of the first two, so a missing route counts as
zero. Comfort and success within five groups of scenario types need more than the result file: the motion
that agents log, and which scenario is of which group.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import xml.etree.ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.predictions import is_unicode
from spacedrive_jax.io import MEBIBYTE, read_text, reason
from spacedrive_jax.json_files import parse_json, read_json

# Which routes a Bench2Drive score is over: the route file of the benchmark, or a plain list.


def read_route_set(path: Path) -> list[str]:
    """Reads the route numbers of a set.

    Args:
        path: a CARLA route file (`<routes><route id=…>`, ending in .xml), a JSON list of numbers (.json), or
            a text file with one number a line.

    Raises:
        DataError: the file cannot be read, names no route, names one twice, or holds something else.
    """
    try:
        text = read_text(path, most=64 * MEBIBYTE)
    except DataError as error:
        raise DataError(f"--routes {path}: cannot be read ({error})") from None
    if path.suffix.lower() == ".xml":
        routes = _from_xml(path, text)
    elif path.suffix.lower() == ".json":
        routes = _from_json(path, text)
    else:
        routes = [line.strip() for line in text.splitlines() if line.strip()]
        # Whatever it is, a heading or a remark, it would count as a route without a result.
        if others := [line for line in routes if not line.isdecimal()]:
            raise DataError(f"--routes {path}: {others[0][:60]!r} is no route number; give one a line")
    if not routes:
        raise DataError(f"--routes {path}: holds no route")
    twice = sorted({route for route in routes if routes.count(route) > 1})
    if twice:
        raise DataError(f"--routes {path}: {', '.join(twice)} occur more than once")
    return routes


def _from_xml(path: Path, text: str) -> list[str]:
    # Expat expands entities; no route file has any, so a document that declares one is refused.
    if "<!ENTITY" in text:
        raise DataError(f"--routes {path}: declares XML entities, which a route file has no use for")
    try:
        root = xml.etree.ElementTree.fromstring(text)
    except xml.etree.ElementTree.ParseError as error:
        raise DataError(f"--routes {path}: is not XML ({error})") from None
    routes = [route.get("id") for route in root.iter("route")]
    if None in routes:
        raise DataError(f"--routes {path}: a <route> has no id")
    return [route for route in routes if route is not None]


def _from_json(path: Path, text: str) -> list[str]:
    routes = parse_json(text, f"--routes {path}")
    if not isinstance(routes, list) or not all(
        isinstance(route, str | int) and not isinstance(route, bool) for route in routes
    ):
        raise DataError(f"--routes {path}: must be a list of route numbers")
    return [str(route) for route in routes]


MOST_BYTES = 256 * MEBIBYTE
"""Largest result file that is read; the benchmark's are a few hundred kilobytes."""
ROUTES_IN_SET = 220
"""Routes of the standard set (`bench2drive220.xml`), the denominator when no other set is given."""

PENALTIES: Mapping[str, float] = {
    "collisions_pedestrian": 0.5,
    "collisions_vehicle": 0.6,
    "collisions_layout": 0.65,
    "red_light": 0.7,
    "stop_infraction": 0.8,
    "scenario_timeouts": 0.7,
    "yield_emergency_vehicle_infractions": 0.7,
}
"""Factor on the route's score for every entry of the kind."""
SCORE_TOLERANCE = 0.02
"""Percentages in messages have two decimals, so a recomputed score is no nearer than this."""

MAX_SPEED_PERCENT = 1000.0
"""Speed checks above this are ignored: the surrounding traffic stands still."""
_PERCENT = re.compile(r"(?:^|[\s(])(\d+\.?\d*)%")
"""A whole number or a decimal one with a point: of `50,5%` or `1e-05%` no part is taken."""
_COMPLETED = frozenset({"Completed", "Perfect"})


@dataclasses.dataclass(frozen=True)
class RouteResult:
    """One route's record in a result file."""

    route: str
    """The route's number, from `RouteScenario_<number>_rep0`."""
    scenario: str
    """Scenario type, such as `ParkingCutIn`."""
    save_name: str
    """Folder of the route's own logs."""
    status: str
    """`Perfect`, `Completed` or `Failed - <reason>`."""
    completion: float
    """Percentage of the route that was driven."""
    score: float
    """Completion times penalties, 0..100."""
    infractions: Mapping[str, Sequence[str]]
    """Kind to messages."""

    @property
    def success(self) -> bool:
        """Driven to the end with no infraction but low speed."""
        offences = (
            messages for kind, messages in self.infractions.items() if kind != "min_speed_infractions"
        )
        return self.status in _COMPLETED and not any(offences)

    def speed_percentages(self) -> list[float]:
        """The ego vehicle's mean speed in percent of the traffic around it, one value a checkpoint.

        Raises:
            DataError: a message holds no percentage.
        """
        return self._percentages("min_speed_infractions")

    def penalty(self) -> float:
        """The factor on the completion that follows from the infractions, 0..1.

        Raises:
            DataError: an `outside_route_lanes` message holds no percentage.
        """
        penalties = (each for kind, each in PENALTIES.items() for _ in self.infractions.get(kind, ()))
        factor = math.prod(penalties, start=1.0)
        for percent in self._percentages("outside_route_lanes"):
            factor *= 1 - percent / 100
        return factor

    def _percentages(self, kind: str) -> list[float]:
        """What the messages of a kind say, one number each."""
        found = []
        for message in self.infractions.get(kind, ()):
            match = _PERCENT.search(message)
            if match is None:
                raise DataError(
                    f"route {self.route}: no percentage in {kind} {message!r}; it must be written like 50.5%"
                )
            found.append(float(match.group(1)))
        return found

    def recomputed_score(self) -> float:
        """The score that follows from completion and infractions.

        Raises:
            DataError: an `outside_route_lanes` message holds no percentage.
        """
        return self.completion * self.penalty()


@dataclasses.dataclass(frozen=True)
class Bench2DriveScores:
    """Scores of a set of routes."""

    driving_score: float
    """Mean score over the set, missing routes as 0."""
    success_rate: float
    """Percent of the set."""
    efficiency: float | None
    """Mean over routes of their mean speed percentage; None where no route has one."""
    routes: int
    """Routes with a result."""
    route_set: int
    """Routes in the set."""
    missing: int
    """Routes of the set without a result."""
    missing_routes: tuple[str, ...]
    """Which ones, where the set is known by number."""
    foreign_routes: tuple[str, ...]
    """Results of routes that are not in the set; they do not count."""
    without_speed: tuple[str, ...]
    """Routes without a usable speed check, left out of the efficiency."""
    inconsistent: tuple[str, ...]
    """Routes whose stored score does not follow from their infractions."""
    statuses: Mapping[str, int]
    """How many routes ended how."""


def read_results(paths: Sequence[Path]) -> list[RouteResult]:
    """Reads one result file, or the shards of one run.

    Raises:
        DataError: a file is not a result file, a field is missing or wrong, or a route occurs twice.
    """
    results: dict[str, tuple[RouteResult, Path]] = {}
    for path in paths:
        for index, record in enumerate(_records(path)):
            result = _parse(record, f"{path}, record {index}")
            if result.route in results:
                raise DataError(
                    f"route {result.route} occurs twice, in {results[result.route][1]} and {path}: "
                    f"give every route once"
                )
            results[result.route] = result, path
    return [result for result, _ in results.values()]


def _records(path: Path) -> list[Any]:
    try:
        content = read_json(path, most=MOST_BYTES, nan=True)
    except DataError as error:
        raise DataError(f"cannot read {path}: {reason(error, path)}") from None
    checkpoint = content.get("_checkpoint") if isinstance(content, dict) else None
    records = checkpoint.get("records") if isinstance(checkpoint, dict) else None
    if not isinstance(records, list):
        raise DataError(f'{path} is no Bench2Drive result file: "_checkpoint"."records" is not a list')
    return records


def _parse(record: Any, where: str) -> RouteResult:
    def field(owner: Any, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        value = owner.get(name) if isinstance(owner, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f'{where}: "{name}" must be {expected}, found {str(value)[:60]!r}')
        return value

    identity = field(record, "route_id", str, "a text")
    parts = identity.split("_")
    if len(parts) < 2 or parts[0] != "RouteScenario" or not parts[1] or not is_unicode(identity):
        raise DataError(f'{where}: "route_id" must look like RouteScenario_<number>_rep0, found {identity!r}')
    scores = field(record, "scores", dict, "an object")
    numbers = {
        name: float(field(scores, name, (int, float), "a number"))
        for name in ("score_route", "score_composed")
    }
    for name, value in numbers.items():
        if not 0 <= value <= 100:
            raise DataError(f'{where}: "{name}" must be within 0 and 100, found {value}')
    infractions = field(record, "infractions", dict, "an object")
    for kind in infractions:
        messages = field(infractions, kind, list, "a list of texts")
        if not all(isinstance(message, str) for message in messages):
            raise DataError(f'{where}: "{kind}" must be a list of texts, found {str(messages)[:60]}')
    return RouteResult(
        route=parts[1],
        scenario=re.sub(r"_\d+$", "", field(record, "scenario_name", str, "a text")),
        save_name=_save_name(record, identity, where),
        status=field(record, "status", str, "a text"),
        completion=numbers["score_route"],
        score=numbers["score_composed"],
        infractions=infractions,
    )


def _save_name(record: Mapping[str, Any], identity: str, where: str) -> str:
    """Folder of the route's logs; named after the route where the record does not say."""
    name = record.get("save_name")
    if name is None or name == "":
        return identity
    if not isinstance(name, str):
        raise DataError(f'{where}: "save_name" must be a text, found {str(name)[:60]!r}')
    return name


def score_routes(results: Sequence[RouteResult], route_set: Sequence[str] | None = None) -> Bench2DriveScores:
    """Scores a run.

    Args:
        results: the routes' results.
        route_set: numbers of the routes in the set; the standard 220 when None.

    Raises:
        DataError: more results than routes in the set, or none of the set.
    """
    size = ROUTES_IN_SET if route_set is None else len(route_set)
    wanted = None if route_set is None else set(route_set)
    counted = [result for result in results if wanted is None or result.route in wanted]
    if len(counted) > size:
        raise DataError(f"{len(counted)} results for a set of {size} routes: name the set with --routes FILE")
    if not counted:
        raise DataError("no result of a route in the set: check the result file and --routes")
    speeds = {
        result.route: [value for value in result.speed_percentages() if value <= MAX_SPEED_PERCENT]
        for result in counted
    }
    means = [sum(values) / len(values) for values in speeds.values() if values]
    statuses: dict[str, int] = {}
    for result in counted:
        statuses[result.status] = statuses.get(result.status, 0) + 1
    have = {result.route for result in counted}
    return Bench2DriveScores(
        driving_score=sum(result.score for result in counted) / size,
        success_rate=100 * sum(result.success for result in counted) / size,
        efficiency=sum(means) / len(means) if means else None,
        routes=len(counted),
        route_set=size,
        missing=size - len(counted),
        missing_routes=tuple(route for route in route_set or () if route not in have),
        foreign_routes=tuple(result.route for result in results if result.route not in have),
        without_speed=tuple(route for route, values in speeds.items() if not values),
        inconsistent=tuple(
            result.route
            for result in counted
            if abs(result.recomputed_score() - result.score) > SCORE_TOLERANCE
        ),
        statuses=dict(sorted(statuses.items())),
    )


# Comfort ("smoothness") of Bench2Drive: the share of two-second pieces within comfortable motion.
#
# Kept from the benchmark's tool, and questionable: a time step of 0.1 s although agents log at 20 Hz, the
# smoothed yaw rate in place of the yaw acceleration, and CARLA's degrees per second held against bounds in
# radians.


PIECE_STEPS = 20
STEP_S = 0.1
WINDOW = 7
ORDER = 2

LONGITUDINAL_ACCELERATION = (-4.05, 2.40)
LATERAL_ACCELERATION = (-4.89, 4.89)
JERK = (-8.37, 8.37)
LONGITUDINAL_JERK = (-4.13, 4.13)
YAW_RATE = (-0.95, 0.95)
YAW_ACCELERATION = (-1.93, 1.93)

_FIELDS = ("acceleration", "angular_velocity", "forward_vector", "right_vector")


def comfort(motion: Float[np.ndarray, "T 4 3"]) -> float:
    """Share of a route's pieces whose motion is comfortable, 0..1.

    Pieces are 20 steps long; a shorter tail is dropped, a route of up to 20 steps is one piece.

    Args:
        motion: acceleration (m/s²), angular velocity, forward vector and right vector at every step.

    Raises:
        DataError: fewer than three steps, too few to smooth.
    """
    if len(motion) <= ORDER:
        raise DataError(f"comfort needs at least {ORDER + 1} steps, found {len(motion)}")
    if len(motion) <= PIECE_STEPS:
        return float(_comfortable(motion))
    pieces = [
        motion[start : start + PIECE_STEPS] for start in range(0, len(motion) - PIECE_STEPS + 1, PIECE_STEPS)
    ]
    return sum(map(_comfortable, pieces)) / len(pieces)


def _comfortable(motion: Float[np.ndarray, "T 4 3"]) -> bool:
    smooth = functools.partial(exact.savitzky_golay, window=min(WINDOW, len(motion)), step=STEP_S)
    acceleration, forward, right = motion[:, 0, :2], motion[:, 2, :2], motion[:, 3, :2]
    longitudinal = smooth(np.sum(acceleration * forward, axis=1))
    lateral = smooth(np.sum(acceleration * right, axis=1))
    magnitude = smooth(exact.norm(acceleration))
    yaw_rate = smooth(np.unwrap(motion[:, 1, 2]))
    checks = (
        (longitudinal, LONGITUDINAL_ACCELERATION),
        (lateral, LATERAL_ACCELERATION),
        (smooth(magnitude, deriv=1), JERK),
        (smooth(longitudinal, deriv=1), LONGITUDINAL_JERK),
        (yaw_rate, YAW_ACCELERATION),
        (yaw_rate, YAW_RATE),
    )
    return all(bool(np.all((values > low) & (values < high))) for values, (low, high) in checks)


def read_motion(path: Path) -> Float[np.ndarray, "T 4 3"]:
    """Reads a route's `metric_info.json`: step to its vectors, in file order.

    Raises:
        DataError: the file is not such an object.
    """
    try:
        steps = read_json(path, nan=True)
        motion = np.array([[step[name] for name in _FIELDS] for step in steps.values()], np.float64)
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise DataError(f"{path}: every step must have {', '.join(_FIELDS)}") from None
    if motion.ndim != 3 or motion.shape[1:] != (len(_FIELDS), 3) or not np.isfinite(motion).all():
        raise DataError(f"{path}: {', '.join(_FIELDS)} must be three finite numbers each at every step")
    return motion


_JUNCTION_CONFLICTS = (
    "BlockedIntersection",
    "OppositeVehicleTakingPriority",
    "OppositeVehicleRunningRedLight",
    "PedestrianCrossing",
    "VehicleTurningRoute",
    "VehicleTurningRoutePedestrian",
)
_JUNCTION_MERGES = (
    "EnterActorFlow",
    "CrossingBicycleFlow",
    "NonSignalizedJunctionLeftTurn",
    "NonSignalizedJunctionRightTurn",
    "NonSignalizedJunctionLeftTurnEnterFlow",
    "SignalizedJunctionLeftTurn",
    "SignalizedJunctionRightTurn",
    "SignalizedJunctionLeftTurnEnterFlow",
)

ABILITIES: Mapping[str, frozenset[str]] = {
    "overtaking": frozenset(
        {
            "Accident",
            "AccidentTwoWays",
            "ConstructionObstacle",
            "ConstructionObstacleTwoWays",
            "HazardAtSideLane",
            "HazardAtSideLaneTwoWays",
            "ParkedObstacle",
            "ParkedObstacleTwoWays",
            "VehicleOpensDoorTwoWays",
        }
    ),
    "merging": frozenset(
        {
            *_JUNCTION_MERGES,
            "HighwayCutIn",
            "HighwayExit",
            "InterurbanActorFlow",
            "InterurbanAdvancedActorFlow",
            "MergerIntoSlowTraffic",
            "MergerIntoSlowTrafficV2",
            "ParkingExit",
            "SequentialLaneChange",
        }
    ),
    "emergency_brake": frozenset(
        {
            *_JUNCTION_CONFLICTS,
            "ControlLoss",
            "DynamicObjectCrossing",
            "HardBreakRoute",
            "ParkingCrossingPedestrian",
            "ParkingCutIn",
            "StaticCutIn",
        }
    ),
    "give_way": frozenset({"InvadingTurn", "YieldToEmergencyVehicle"}),
    "traffic_signs": frozenset(
        {
            *_JUNCTION_CONFLICTS,
            *_JUNCTION_MERGES,
            "T_Junction",
            "VanillaNonSignalizedTurn",
            "VanillaNonSignalizedTurnEncounterStopsign",
            "VanillaSignalizedTurnEncounterGreenLight",
            "VanillaSignalizedTurnEncounterRedLight",
        }
    ),
}
"""Scenario types by ability, Bench2Drive 0.0.4 (0.0.3 misspelt four of them and so never counted them)."""


def ability_rates(
    results: Sequence[RouteResult], junctions: Mapping[str, float] | None = None
) -> dict[str, float | None]:
    """Success rate per ability, percent, and their plain mean.

    A failed traffic-sign route still counts when the ego vehicle drove past its first junction without
    running a red light or a stop sign. Only CARLA's maps tell where that junction is, so `traffic_signs` and
    the mean are None without `junctions`. Routes without a result are in no group, as published.

    `traffic_signs` and `mean` are those of release 0.0.4, which counts a route once. Release 0.0.3, from
    which the published 0.0.3 tables come, took the mean of successes and of routes that obeyed, a success
    among them: `traffic_signs_0_0_3` and `mean_0_0_3` are that, over the groups of 0.0.4.

    Args:
        results: results of the routes in the set.
        junctions: route number to the completion (0..1) at which its first junction is passed.

    Raises:
        DataError: a failed traffic-sign route is not in `junctions`.
    """
    rates: dict[str, float | None] = {}
    older: float | None = None
    for ability, scenarios in ABILITIES.items():
        group = [result for result in results if result.scenario in scenarios]
        signs = ability == "traffic_signs"
        if not group or (signs and junctions is None):
            rates[ability] = None
            continue
        passed = [result.success or (signs and _obeyed_signs(result, junctions or {})) for result in group]
        rates[ability] = 100 * sum(passed) / len(group)
        if signs:
            both = sum(passed) + sum(result.success for result in group)
            older = 100 * both / (2 * len(group))
    return rates | {
        "mean": _mean(rates),
        "traffic_signs_0_0_3": older,
        "mean_0_0_3": _mean(rates | {"traffic_signs": older}),
    }


def _mean(rates: Mapping[str, float | None]) -> float | None:
    known = [rate for rate in rates.values() if rate is not None]
    return sum(known) / len(known) if len(known) == len(ABILITIES) else None


def _obeyed_signs(result: RouteResult, junctions: Mapping[str, float]) -> bool:
    if result.route not in junctions:
        raise DataError(f"--junctions: route {result.route} ({result.scenario}) is missing")
    offences = [*result.infractions.get("stop_infraction", ()), *result.infractions.get("red_light", ())]
    return result.completion / 100 > junctions[result.route] and not offences


def read_junctions(path: Path) -> dict[str, float]:
    """Reads a JSON object of route number to the completion (0..1) at which its first junction is passed.

    The benchmark takes it from CARLA: (route points up to the first junction point + 8) / route points, the
    route traced at 1 m.

    Raises:
        DataError: the file is not such an object.
    """
    try:
        content = read_json(path, most=64 * MEBIBYTE)
    except DataError as error:
        raise DataError(f"--junctions {path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict) or not all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 10
        for value in content.values()
    ):
        raise DataError(f"--junctions {path}: must be an object of route number to a completion from 0 to 1")
    return {str(route): float(value) for route, value in content.items()}

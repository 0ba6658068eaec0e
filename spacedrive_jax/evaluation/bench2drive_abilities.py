"""Bench2Drive beyond its driving score: comfort, and success within five groups of scenario types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.bench2drive_results import RouteResult
from spacedrive_jax.io import MEBIBYTE
from spacedrive_jax.json_files import read_json

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
    window = min(WINDOW, len(motion))

    def smooth(values: Float[np.ndarray, "T"], derivative: int = 0) -> Float[np.ndarray, "T"]:
        return _smoothed(values, window, slope=bool(derivative))

    acceleration, forward, right = motion[:, 0, :2], motion[:, 2, :2], motion[:, 3, :2]
    longitudinal = smooth(np.sum(acceleration * forward, axis=1))
    lateral = smooth(np.sum(acceleration * right, axis=1))
    magnitude = smooth(exact.norm(acceleration))
    yaw_rate = smooth(np.unwrap(motion[:, 1, 2]))
    checks = (
        (longitudinal, LONGITUDINAL_ACCELERATION),
        (lateral, LATERAL_ACCELERATION),
        (smooth(magnitude, derivative=1), JERK),
        (smooth(longitudinal, derivative=1), LONGITUDINAL_JERK),
        (yaw_rate, YAW_ACCELERATION),
        (yaw_rate, YAW_RATE),
    )
    return all(bool(np.all((values > low) & (values < high))) for values, (low, high) in checks)


def _smoothed(values: Float[np.ndarray, "T"], window: int, *, slope: bool) -> Float[np.ndarray, "T"]:
    """Savitzky and Golay's filter of second order: `scipy.signal.savgol_filter` with its mode `interp`.

    Each value becomes that of the parabola through the window around it (near the ends: the first or last
    window). Fitted here with orthogonal polynomials, since SciPy's fit goes through LAPACK and what comes
    out is held against bounds.

    Args:
        values: one every `STEP_S`.
        window: values to fit to.
        slope: gives the parabola's slope, per second, in place of its value.
    """
    index = np.arange(len(values))
    first = np.clip(index - window // 2, 0, len(values) - window)
    place = np.arange(window) - (window - 1) / 2
    square = place * place - np.mean(place * place)
    seen = values[first[:, None] + np.arange(window)]
    linear = exact.dot(seen, place) / exact.dot(place, place)
    bent = exact.dot(seen, square) / exact.dot(square, square)
    here = index - first - (window - 1) / 2
    if slope:
        return (linear + 2 * bent * here) / STEP_S
    return seen.mean(axis=1) + linear * here + bent * (here * here - np.mean(place * place))


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

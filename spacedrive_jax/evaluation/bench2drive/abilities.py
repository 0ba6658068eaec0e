"""The five abilities of Bench2Drive: success rate within groups of scenario types."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from spacedrive_jax.console import UserError
from spacedrive_jax.evaluation.bench2drive.results import RouteResult

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

    Args:
        results: results of the routes in the set.
        junctions: route number to the completion (0..1) at which its first junction is passed.

    Raises:
        UserError: a failed traffic-sign route is not in `junctions`.
    """
    rates: dict[str, float | None] = {}
    for ability, scenarios in ABILITIES.items():
        group = [result for result in results if result.scenario in scenarios]
        signs = ability == "traffic_signs"
        if not group or (signs and junctions is None):
            rates[ability] = None
            continue
        passed = [result.success or (signs and _obeyed_signs(result, junctions or {})) for result in group]
        rates[ability] = 100 * sum(passed) / len(group)
    known = [rate for rate in rates.values() if rate is not None]
    return rates | {"mean": sum(known) / len(known) if len(known) == len(ABILITIES) else None}


def _obeyed_signs(result: RouteResult, junctions: Mapping[str, float]) -> bool:
    if result.route not in junctions:
        raise UserError(f"--junctions: route {result.route} ({result.scenario}) is missing")
    offences = [*result.infractions.get("stop_infraction", ()), *result.infractions.get("red_light", ())]
    return result.completion / 100 > junctions[result.route] and not offences


def read_junctions(path: Path) -> dict[str, float]:
    """Reads a JSON object of route number to the completion (0..1) at which its first junction is passed.

    The benchmark takes it from CARLA: (route points up to the first junction point + 8) / route points, the
    route traced at 1 m.

    Raises:
        UserError: the file is not such an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--junctions {path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict) or not all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in content.values()
    ):
        raise UserError(f"--junctions {path}: must be an object of route number to a completion from 0 to 1")
    return {str(route): float(value) for route, value in content.items()}

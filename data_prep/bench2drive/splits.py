"""Which clips are for training and which for validation."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.bench2drive.clips import Clip
from data_prep.nuscenes.splits import split_scenes

TOWNS = frozenset(
    [
        "Town01",
        "Town02",
        "Town03",
        "Town04",
        "Town05",
        "Town06",
        "Town07",
        "Town10HD",
        "Town11",
        "Town12",
        "Town13",
        "Town15",
    ]
)
"""CARLA's, that the benchmark's data was recorded in."""

VALIDATION = frozenset(
    [
        "AccidentTwoWays_Town12_Route1115_Weather23",
        "Accident_Town05_Route218_Weather10",
        "BlockedIntersection_Town03_Route135_Weather5",
        "ConstructionObstacleTwoWays_Town12_Route1093_Weather1",
        "ConstructionObstacle_Town10HD_Route74_Weather22",
        "ConstructionObstacle_Town12_Route78_Weather0",
        "ControlLoss_Town04_Route170_Weather14",
        "ControlLoss_Town10HD_Route378_Weather14",
        "CrossingBicycleFlow_Town12_Route977_Weather15",
        "DynamicObjectCrossing_Town01_Route3_Weather3",
        "DynamicObjectCrossing_Town02_Route11_Weather11",
        "EnterActorFlow_Town03_Route132_Weather2",
        "HardBreakRoute_Town01_Route32_Weather6",
        "HazardAtSideLaneTwoWays_Town12_Route1151_Weather7",
        "HazardAtSideLane_Town10HD_Route373_Weather9",
        "HighwayCutIn_Town12_Route1029_Weather15",
        "HighwayExit_Town06_Route312_Weather0",
        "InterurbanActorFlow_Town12_Route1291_Weather1",
        "InterurbanAdvancedActorFlow_Town06_Route324_Weather2",
        "InvadingTurn_Town02_Route95_Weather9",
        "LaneChange_Town06_Route307_Weather21",
        "MergerIntoSlowTrafficV2_Town12_Route857_Weather25",
        "MergerIntoSlowTraffic_Town06_Route317_Weather5",
        "NonSignalizedJunctionLeftTurnEnterFlow_Town12_Route949_Weather13",
        "NonSignalizedJunctionLeftTurn_Town07_Route342_Weather3",
        "NonSignalizedJunctionRightTurn_Town03_Route126_Weather18",
        "OppositeVehicleRunningRedLight_Town04_Route180_Weather23",
        "OppositeVehicleTakingPriority_Town04_Route214_Weather6",
        "ParkedObstacleTwoWays_Town13_Route1333_Weather26",
        "ParkedObstacle_Town06_Route282_Weather22",
        "ParkedObstacle_Town10HD_Route372_Weather8",
        "ParkingCrossingPedestrian_Town13_Route545_Weather25",
        "ParkingCutIn_Town13_Route1343_Weather1",
        "ParkingExit_Town12_Route922_Weather12",
        "PedestrianCrossing_Town13_Route747_Weather19",
        "SignalizedJunctionLeftTurnEnterFlow_Town13_Route657_Weather2",
        "SignalizedJunctionLeftTurn_Town04_Route173_Weather26",
        "SignalizedJunctionRightTurn_Town03_Route118_Weather14",
        "StaticCutIn_Town05_Route226_Weather18",
        "TJunction_Town05_Route260_Weather0",
        "TJunction_Town06_Route306_Weather20",
        "VanillaNonSignalizedTurnEncounterStopsign_Town12_Route979_Weather9",
        "VanillaSignalizedTurnEncounterGreenLight_Town07_Route354_Weather8",
        "VanillaSignalizedTurnEncounterRedLight_Town07_Route359_Weather21",
        "VanillaSignalizedTurnEncounterRedLight_Town15_Route491_Weather23",
        "VehicleOpensDoorTwoWays_Town12_Route1203_Weather7",
        "VehicleTurningRoutePedestrian_Town15_Route445_Weather11",
        "VehicleTurningRoutePedestrian_Town15_Route481_Weather19",
        "VehicleTurningRoute_Town15_Route504_Weather10",
        "YieldToEmergencyVehicle_Town04_Route166_Weather10",
    ]
)
"""The 50 clips of the base set that Bench2DriveZoo validates on (data/splits); all others are trained on."""


def split_clips(clips: Sequence[Clip], seed: int) -> tuple[dict[str, str], str]:
    """Assigns every clip to `train` or `val`.

    Args:
        clips: of one data set.
        seed: of the split where the clips are not the benchmark's.

    Returns:
        Clip name to split, and the rule: `official` where all clips are of CARLA's towns, else `hashed`.
    """
    if all(clip.parts.get("town") in TOWNS for clip in clips):
        return {clip.name: "val" if clip.name in VALIDATION else "train" for clip in clips}, "official"
    return split_scenes("bench2drive", [clip.name for clip in clips], seed)

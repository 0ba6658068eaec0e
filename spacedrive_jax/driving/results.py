"""A drive's result in Bench2Drive's own files, with the PDM-style scores beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import shapely
from msgspec import Meta

from spacedrive_jax import exact
from spacedrive_jax.driving.drive_log import DriveLog, LaneMap
from spacedrive_jax.driving.driver import Decision
from spacedrive_jax.driving.infractions import completion, messages
from spacedrive_jax.driving.pdm import PdmScore, neuro_ncap, pdm_score
from spacedrive_jax.evaluation.bench2drive import RouteResult
from spacedrive_jax.json_files import convert, read_json
from spacedrive_jax.world.ground import polygons_of
from spacedrive_jax.world.traffic import TIME_STEP

ENDINGS = {
    "deviated": ("route_dev", "Failed - Agent deviated from the route"),
    "blocked": ("vehicle_blocked", "Failed - Agent got blocked"),
    "timeout": ("route_timeout", "Failed - Agent timed out"),
    "crashed": (None, "Failed - Agent crashed"),
}
"""Why a drive ended before its goal: the infraction it is listed under, and the status."""


def drive_record(
    log: DriveLog,
    lanes: LaneMap,
    *,
    index: int,
    number: int,
    kind: str,
    town: str,
    ending: str,
    expert_metres: float,
    decisions: Sequence[Decision],
    failures: Mapping[str, int],
    reference: PdmScore | None = None,
) -> dict[str, Any]:
    """One record of a result file, as Bench2Drive's evaluator writes it.

    Args:
        log: what happened.
        lanes: of its town.
        index: position in the result file.
        number: the route's number, unique in the set.
        kind: the scenario's.
        town: the town's name.
        ending: `goal`, or a key of `ENDINGS`.
        expert_metres: how far the script's driver goes.
        decisions: what was decided on the way.
        failures: how many answers of the policy were none, by kind.
        reference: the script's own driver's PDM score; see `PdmScore.epdms`.
    """
    found = {name: list(texts) for name, texts in messages(log, lanes).items()}
    share = completion(log)
    if ending in ENDINGS:
        listed, status = ENDINGS[ending]
        if listed is not None:
            found[listed].append(status.removeprefix("Failed - "))
    infractions = sum(map(len, found.values()))
    if ending not in ENDINGS:
        status = "Completed" if infractions else "Perfect"
    name = f"RouteScenario_{number}_rep0"
    penalty = RouteResult(str(number), kind, name, status, share, 0.0, found).penalty()
    pdm = pdm_score(log, lanes, expert_metres, decisions)
    seconds = float(log.time[-1] - log.time[0])
    length = log.goal - log.start
    return {
        "index": index,
        "route_id": name,
        "scenario_name": f"{kind}_1",
        "weather_id": "0",
        "save_name": f"{name}_{town}_{kind}",
        "town_name": town,
        "status": status,
        "num_infractions": infractions,
        "infractions": found,
        "scores": {
            "score_route": round(share, 6),
            "score_penalty": round(penalty, 6),
            "score_composed": round(max(share * penalty, 0.0), 6),
        },
        "meta": {"route_length": length, "duration_game": seconds, "duration_system": seconds},
        "pdm": {**dataclasses.asdict(pdm), "pdms": pdm.pdms, "epdms": pdm.epdms(reference)},
        "neuro_ncap": neuro_ncap(log),
        "failures": dict(sorted(failures.items())),
    }


_Number = Annotated[float, Meta(ge=-1e8, le=1e8)]
_Point = tuple[_Number, _Number]
_Pose = tuple[_Number, _Number, _Number]
# `extended_comfort` is null where no two plans could be compared, and lacks in older runs.
_PDM_NUMBERS = sorted({each.name for each in dataclasses.fields(PdmScore)} - {"extended_comfort"})
_Pdm = msgspec.defstruct(
    "_Pdm",
    [
        *((name, _Number) for name in (*_PDM_NUMBERS, "pdms", "epdms")),
        ("extended_comfort", _Number | None, None),
    ],
)


class _Scores(msgspec.Struct):
    score_composed: Annotated[float, Meta(ge=0, le=100)]


class _OpenLoop(msgspec.Struct):
    l2: Annotated[float, Meta(ge=0, le=1e8)]
    decisions: Annotated[int, Meta(ge=0)]


class _Record(msgspec.Struct):
    """What is read back of `drive_record` and of `open_loop`."""

    index: Annotated[int, Meta(ge=0, le=1 << 31)]
    route_id: Annotated[str, Meta(pattern=r"^RouteScenario_\d+_")]
    status: str
    infractions: dict[str, list[str]]
    scores: _Scores
    pdm: _Pdm  # type: ignore[valid-type]
    neuro_ncap: _Number
    failures: dict[str, int]
    open_loop: _OpenLoop | None = None


class _NoPlace(msgspec.Struct):
    no_place: str


class _Checkpoint(msgspec.Struct):
    records: list[_Record]


class _ResultFile(msgspec.Struct):
    checkpoint: _Checkpoint = msgspec.field(name="_checkpoint")


class _Other(msgspec.Struct):
    category: str
    size: _Point
    poses: Annotated[list[_Pose], Meta(min_length=1)]


class _Decision(msgspec.Struct):
    time: _Number
    pose: _Pose
    waypoints: list[_Point] | None


class _Trace(msgspec.Struct):
    """What the page shows of `trace` and of the decisions."""

    step_s: Annotated[float, Meta(gt=0, le=10)]
    ego: Annotated[list[tuple[_Number, _Number, _Number, _Number, _Number, _Number]], Meta(min_length=1)]
    road: list[list[_Point]]
    lanes: list[list[_Point]]
    route: list[_Point]
    others: list[_Other]
    decisions: list[_Decision]
    wrong_at: Annotated[float, Meta(ge=0, le=1e6)] | None = None


_AGAIN = "drive it again: remove its folder, then drive --resume"


def read_drive(path: Path) -> dict[str, Any]:
    """A drive's result.json: its record, or `no_place` and why.

    Raises:
        DataError: it is damaged.
    """
    value = read_json(path)
    no_place = isinstance(value, dict) and "no_place" in value
    convert(value, _NoPlace if no_place else _Record, path, _AGAIN)
    return value


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run's results.json.

    Raises:
        DataError: it is damaged, or of a run that is not of `drive`.
    """
    value = read_json(path)
    convert(value, _ResultFile, path, "drive --resume writes it again")
    return value["_checkpoint"]["records"]


def read_trace(path: Path) -> dict[str, Any]:
    """A drive's trace.json.

    Raises:
        DataError: it is damaged.
    """
    value = read_json(path)
    convert(value, _Trace, path, _AGAIN)
    return value


def result_file(records: Sequence[Mapping[str, Any]], total: int) -> dict[str, Any]:
    """The result file of a run, as `score-bench2drive` (and Bench2Drive's own tools) read it."""
    return {
        "_checkpoint": {
            "global_record": {},
            "progress": [len(records), total],
            "records": [dict(record) for record in records],
        },
        "entry_status": "Finished" if len(records) == total else "Started",
        "eligible": len(records) == total,
        "sensors": [],
        "values": [],
        "labels": [],
    }


def metric_info(log: DriveLog) -> dict[str, dict[str, list[float]]]:
    """Bench2Drive's `metric_info.json`: the vehicle's motion at every step, for its comfort score.

    In CARLA's axes (y to the right), angular velocity in rad/s: the tool holds it against bounds in rad/s.
    """
    cos, sin = exact.cos_sin(log.ego[:, 2])
    lateral = log.ego[:, 3] * log.yaw_rate
    info = {}
    for step in range(len(log.time)):
        c, s = float(cos[step]), float(sin[step])
        along, left = float(log.acceleration[step]), float(lateral[step])
        x, y = along * c - left * s, along * s + left * c
        info[str(step)] = {
            "acceleration": [x, -y, 0.0],
            "angular_velocity": [0.0, 0.0, -float(log.yaw_rate[step])],
            "forward_vector": [c, -s, 0.0],
            "right_vector": [s, c, 0.0],
            "location": [float(log.ego[step, 0]), -float(log.ego[step, 1]), 0.0],
            "rotation": [0.0, 0.0, -math.degrees(float(log.ego[step, 2]))],
        }
    return info


SHOWN = 60.0
"""Metres around the way whose ground is kept for the film."""


def _ground(log: DriveLog) -> dict[str, Any]:
    """Road, lanes and route around the way, decimetres."""
    low, high = log.ego[:, :2].min(axis=0) - SHOWN, log.ego[:, :2].max(axis=0) + SHOWN
    area = shapely.box(*low, *high)
    town, route = log.scenario.town, log.scenario.ego.route
    road = polygons_of(town.drivable.intersection(area).simplify(0.2))
    lanes = [
        shapely.intersection(shapely.LineString(lane.centre), area)
        for lane in town.lanes.values()
        if lane.road is not None
    ]
    ahead = (route.lengths >= log.start - 5.0) & (route.lengths <= log.goal)
    return {
        "road": [np.array(polygon.exterior.coords).round(1).tolist() for polygon in road],
        "lanes": [
            shapely.get_coordinates(line)[::8].round(1).tolist() for line in lanes if line.length > 8.0
        ],
        "route": route.points[ahead][::4].round(2).tolist(),
    }


def trace(log: DriveLog) -> dict[str, Any]:
    """The drive as plain numbers for the report: who was where, ten times a second."""
    moved = np.ptp(log.poses[:, :, :2], axis=0).max(axis=1) > 0.05
    near = exact.norm(log.poses[..., :2] - log.poses[:, :1, :2]).min(axis=0) < 60.0
    shown = np.flatnonzero(near)
    return {
        "step_s": TIME_STEP,
        **_ground(log),
        "ego": log.ego.round(4).tolist(),
        "aside": log.aside.round(3).tolist(),
        "others": [
            {
                "key": log.keys[i],
                "category": log.categories[i],
                "size": [round(2 * float(extent), 3) for extent in log.half[i]],
                "poses": log.poses[:: 1 if moved[i] else len(log.time), i].round(3).tolist(),
            }
            for i in shown.tolist()
            if i
        ],
    }

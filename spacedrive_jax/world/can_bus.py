"""CAN bus messages of the ego vehicle in the files and fields of the nuScenes CAN bus expansion.

`pose` is exact (with a little sensor noise on acceleration and rates) and lies in the ego frame as in the
real data; the others are derived from the same motion with a kinematic bicycle. `zoesensors` comes at
100 Hz instead of about 1 kHz to keep the files small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.io import write_text
from spacedrive_jax.json_files import to_json
from spacedrive_jax.world.scenario import WARM_UP, Scenario
from spacedrive_jax.world.traffic import TIME_STEP, Route
from spacedrive_jax.world.vehicle import WHEEL_BASE, VehicleState, moved

STEERING_RATIO = 15.0
WHEEL_RADIUS = 0.32
GRAVITY = 9.81

Message = dict[str, Any]

FIRST_MESSAGE = WARM_UP - 0.3
"""Seconds since the start of the simulation at which the messages begin."""
POSE_RATE = 50.0
"""Pose messages a second."""


def noise_seed(seed: int, index: int) -> int:
    """Seed of the sensor noise of a scene."""
    return seed * 100_003 + index


class PoseMessages:
    """The pose messages of one scene, as they come in: `write_can_bus` writes them all at once.

    What was sensed stays as it was sensed, whatever the vehicle does afterwards.
    """

    def __init__(self, start: float, end: float, epoch_us: int, seed: int) -> None:
        """Draws when the messages come.

        Args:
            start: first time of the simulation to report, seconds.
            end: last time, seconds.
            epoch_us: microseconds of simulation time 0.
            seed: of the sensor noise.
        """
        self._rng = np.random.default_rng(seed)
        self._times = _message_times(self._rng, POSE_RATE, start, end)
        self._epoch_us = epoch_us
        self.messages: list[Message] = []

    def until(self, scenario: Scenario, time: float) -> list[Message]:
        """All messages up to the first one behind `time`, seconds since the start of the simulation."""
        while len(self.messages) < len(self._times) and (
            not self.messages or self._times[len(self.messages) - 1] <= time + 1e-6
        ):
            at = float(self._times[len(self.messages)])
            stamp = self._epoch_us + round(at * 1e6)
            self.messages.append(_pose(ego_state(scenario, at), stamp, self._rng))
        return self.messages


def _message_times(rng: np.random.Generator, rate: float, start: float, end: float) -> np.ndarray:
    count = int((end - start) * rate)
    return start + (np.arange(count) + rng.uniform(0.0, 0.2, count)) / rate


def ego_state(scenario: Scenario, time: float) -> dict[str, float]:
    """Pose, speed, accelerations and yaw rate of the rear axle at a time in seconds."""
    step = int(np.clip(time / TIME_STEP, 0, max(len(scenario.driven) - 1, 0)))
    vehicle = scenario.driven[step] if scenario.driven else None
    if vehicle is not None:
        return _driven_state(vehicle, time - step * TIME_STEP)
    s, speed, acceleration = scenario.motions[0].at(time)
    x, y, yaw = scenario.ego.route.pose(s)
    curvature = float(scenario.ego.route.curvature(s))
    return {
        "x": float(x),
        "y": float(y),
        "yaw": float(yaw),
        "speed": speed,
        "acceleration": acceleration,
        "curvature": curvature,
        "yaw_rate": speed * curvature,
    }


def _driven_state(vehicle: VehicleState, elapsed: float) -> dict[str, float]:
    """`ego_state` of a vehicle that somebody steers, `elapsed` seconds into a time step."""
    vehicle = moved(vehicle, elapsed)
    return {
        "x": vehicle.x,
        "y": vehicle.y,
        "yaw": vehicle.yaw,
        "speed": vehicle.speed,
        "acceleration": vehicle.acceleration,
        "curvature": vehicle.curvature,
        "yaw_rate": vehicle.speed * vehicle.curvature,
    }


def write_can_bus(
    scenario: Scenario, name: str, folder: Path, start: float, end: float, epoch_us: int, seed: int
) -> None:
    """Writes all message files of one scene.

    Args:
        scenario: the simulated scene.
        name: scene name, the prefix of the files.
        folder: the `can_bus` folder.
        start: first time of the simulation to report, seconds.
        end: last time, seconds.
        epoch_us: microseconds of simulation time 0.
        seed: of the sensor noise.
    """
    rng = np.random.default_rng(seed)

    def times(rate: float) -> np.ndarray:
        return _message_times(rng, rate, start, end)

    def stamp(time: float) -> int:
        return epoch_us + round(time * 1e6)

    messages: dict[str, list[Message]] = {
        "pose": [_pose(ego_state(scenario, time), stamp(time), rng) for time in times(POSE_RATE)],
        "ms_imu": [_imu(ego_state(scenario, time), stamp(time), rng) for time in times(100)],
        "steeranglefeedback": [
            {"utime": stamp(time), "value": _wheel_angle(ego_state(scenario, time))} for time in times(100)
        ],
        "vehicle_monitor": [_monitor(scenario, time, stamp(time)) for time in times(2)],
        "zoe_veh_info": [_vehicle_info(ego_state(scenario, time), stamp(time)) for time in times(100)],
        "zoesensors": [_pedals(ego_state(scenario, time), stamp(time)) for time in times(100)],
    }
    for kind, rows in messages.items():
        write_text(folder / f"{name}_{kind}.json", to_json(rows))
    points = route_points(scenario.ego.route).tolist()
    write_text(folder / f"{name}_route.json", to_json(points))
    titles = {"pose": "POSE", "ms_imu": "MS_IMU", "steeranglefeedback": "SteerAngleFeedback"}
    titles |= {
        "vehicle_monitor": "VEHICLE_MONITOR",
        "zoe_veh_info": "ZOE_VEH_INFO",
        "zoesensors": "ZoeSensors",
    }
    meta = {titles[kind]: _statistics(rows) for kind, rows in messages.items()}
    write_text(folder / f"{name}_meta.json", to_json(dict(sorted(meta.items()))))


def route_points(route: Route) -> Float[np.ndarray, "K 2"]:
    """A route as the route file holds it: 0.2 m steps, global metres."""
    dense = np.arange(0.0, route.lengths[-1], 0.2)
    return route.pose(dense)[:, :2].round(6)


def _acceleration(state: dict[str, float], rng: np.random.Generator) -> list[float]:
    true = np.array([state["acceleration"], state["speed"] * state["yaw_rate"], GRAVITY])
    return [float(value) for value in true + rng.normal(0.0, 0.02, 3)]


def _rates(state: dict[str, float], rng: np.random.Generator) -> list[float]:
    true = np.array([0.0, 0.0, state["yaw_rate"]])
    return [float(value) for value in true + rng.normal(0.0, 0.001, 3)]


def _orientation(state: dict[str, float]) -> list[float]:
    cos, sin = exact.cos_sin(state["yaw"] / 2)
    sign = 1.0 if cos >= 0 else -1.0
    return [sign * cos, 0.0, 0.0, sign * sin]


def _pose(state: dict[str, float], utime: int, rng: np.random.Generator) -> Message:
    return {
        "accel": _acceleration(state, rng),
        "orientation": _orientation(state),
        "pos": [state["x"], state["y"], 0.0],
        "rotation_rate": _rates(state, rng),
        "utime": utime,
        "vel": [state["speed"], 0.0, 0.0],
    }


def _imu(state: dict[str, float], utime: int, rng: np.random.Generator) -> Message:
    return {
        "linear_accel": _acceleration(state, rng),
        "q": _orientation(state),
        "rotation_rate": _rates(state, rng),
        "utime": utime,
    }


def _wheel_angle(state: dict[str, float]) -> float:
    """Steering wheel angle in radians, positive to the left."""
    return exact.arctan(WHEEL_BASE * state["curvature"]) * STEERING_RATIO


def _rpm(speed: float) -> float:
    return float(speed / (2 * np.pi * WHEEL_RADIUS) * 60)


def _monitor(scenario: Scenario, time: float, utime: int) -> Message:
    state = ego_state(scenario, time)
    later = ego_state(scenario, time + 0.5)
    change = np.degrees(_wheel_angle(later) - _wheel_angle(state)) / 0.5
    ahead = float(np.interp(scenario.motions[0].at(time)[0] + 18.0, scenario.ego.route.lengths,
                            scenario.ego.route.headings)) - state["yaw"]  # fmt: skip
    braking = state["acceleration"] < -0.3 or state["speed"] < 0.05
    return {
        "available_distance": 120,
        "battery_level": 80,
        "brake": int(max(-state["acceleration"], 0) * 8) if braking else 0,
        "brake_switch": 2 if braking else 1,
        "gear_position": 7,
        "left_signal": int(ahead > 0.6),
        "rear_left_rpm": _rpm(state["speed"]),
        "rear_right_rpm": _rpm(state["speed"]),
        "right_signal": int(ahead < -0.6),
        "steering": float(np.degrees(_wheel_angle(state))),
        "steering_speed": float(change),
        "throttle": int(max(state["acceleration"] + 0.2, 0.0) * 100),
        "utime": utime,
        "vehicle_speed": state["speed"] * 3.6,
        "yaw_rate": float(np.degrees(state["yaw_rate"])),
    }


def _vehicle_info(state: dict[str, float], utime: int) -> Message:
    rpm = _rpm(state["speed"])
    steering = float(np.degrees(_wheel_angle(state)))
    return {
        "FL_wheel_speed": rpm,
        "FR_wheel_speed": rpm,
        "RL_wheel_speed": rpm,
        "RR_wheel_speed": rpm,
        "left_solar": 0,
        "longitudinal_accel": state["acceleration"],
        "meanEffTorque": state["acceleration"] * 60.0,
        "odom": 0,
        "odom_speed": state["speed"] * 3.6,
        "pedal_cc": max(state["acceleration"], 0.0) * 60.0,
        "regen": max(-state["acceleration"], 0.0) * 40.0,
        "requestedTorqueAfterProc": state["acceleration"] * 60.0,
        "right_solar": 0,
        "steer_corrected": steering,
        "steer_offset_can": 0.0,
        "steer_raw": steering,
        "transversal_accel": state["speed"] * state["yaw_rate"],
        "utime": utime,
    }


def _pedals(state: dict[str, float], utime: int) -> Message:
    return {
        "brake_sensor": 0.18 + max(-state["acceleration"], 0.0) * 0.05,
        "steering_sensor": 0.19 + _wheel_angle(state) * 0.01,
        "throttle_sensor": 0.12 + max(state["acceleration"], 0.0) * 0.08,
        "utime": utime,
    }


def _statistics(rows: list[Message]) -> dict[str, Any]:
    stamps = np.array([row["utime"] for row in rows], dtype=np.float64)
    span = float(stamps[-1] - stamps[0]) * 1e-6 if len(rows) > 1 else 0.0
    variables = {}
    for key in rows[0]:
        values = np.array([row[key] for row in rows], dtype=np.float64).reshape(len(rows), -1)
        steps = np.diff(values, axis=0) if len(rows) > 1 else np.zeros((1, 1))
        variables[key] = {
            "max": float(values.max()),
            "max_diff": float(steps.max()),
            "mean": float(values.mean()),
            "mean_diff": float(steps.mean()),
            "min": float(values.min()),
            "min_diff": float(steps.min()),
            "std": float(values.std()),
            "std_diff": float(steps.std()),
        }
    return {
        "message_count": len(rows),
        "message_freq": (len(rows) - 1) / span if span else 0.0,
        "timespan": span,
        "var_stats": variables,
    }

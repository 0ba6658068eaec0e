"""Drives the agent's file for some ticks in an old Python; a script, not a test: AGENT_FOLDER URL."""

import enum
import math
import sys
import types

import numpy as np


class Agent:
    def __init__(self, host, port, debug=False):
        pass

    def set_global_plan(self, gps, world):
        self._global_plan, self._global_plan_world_coord = gps, world

    def get_metric_info(self):
        return {"acceleration": [0, 0, 0]}


class Track(enum.Enum):
    SENSORS = "SENSORS"


class Control:
    def __init__(self, throttle=0.0, steer=0.0, brake=0.0):
        self.throttle, self.steer, self.brake = throttle, steer, brake


base = types.ModuleType("leaderboard.autoagents.autonomous_agent")
base.AutonomousAgent, base.Track = Agent, Track
parent = types.ModuleType("leaderboard.autoagents")
parent.autonomous_agent = base
sys.modules.update(
    {"leaderboard": types.ModuleType("leaderboard"), "leaderboard.autoagents": parent, base.__name__: base}
)
try:
    import carla
except ImportError:
    carla = types.ModuleType("carla")
    carla.VehicleControl = Control
    sys.modules["carla"] = carla
sys.path.insert(0, sys.argv[1])
import bench2drive_agent  # noqa: E402

agent = getattr(bench2drive_agent, bench2drive_agent.get_entry_point())("localhost", 2000, False)
place = types.SimpleNamespace(location=types.SimpleNamespace(x=0.0, y=0.0))
end = types.SimpleNamespace(location=types.SimpleNamespace(x=100.0, y=0.0))
agent.set_global_plan([({"lat": 42.0, "lon": 2.0, "z": 0}, 4)] * 2, [(place, 4), (end, 4)])
agent.setup(sys.argv[2] + "?controller=zoo+route")
assert any(sensor["id"] == "LIDAR" for sensor in agent.sensors())  # the server's model reads one
cameras = [sensor["id"] for sensor in agent.sensors() if "camera" in sensor["type"]]
for tick in range(25):
    data = {name: (tick, np.full((900, 1600, 4), 90, np.uint8)) for name in cameras}
    data["IMU"] = (tick, np.array([0.0, 0, 9.8, 0, 0, 0, math.nan if tick == 0 else math.pi / 2]))
    data["LIDAR"] = (tick, np.ones((50, 4), np.float32))
    data["GPS"] = (tick, np.array([42.0, 2.0, 0.0]))
    data["SPEED"] = (tick, {"speed": 0.5})
    control = agent.run_step(data, 0.5 + tick * 0.05)
assert control.throttle > 0, control
assert control.brake == 0, control
assert abs(control.steer) < 1e-3, control
agent.destroy()
print("drove 25 ticks in Python", sys.version.split()[0])

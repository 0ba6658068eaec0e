"""The shipped agent file, in the life cycle of the benchmark's evaluator, against a running server."""

import ast
import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from data_prep.synthesize.recorder import town_of
from spacedrive_jax.cli.main import main
from spacedrive_jax.driving.bench2drive_control import PRESETS
from spacedrive_jax.driving.bench2drive_rig import LIDAR, RIG, camera_intrinsics, camera_to_ego, ego_numbers
from spacedrive_jax.driving.protocol import partial_record
from spacedrive_jax.world import traffic
from tests.conftest import ROOT
from tests.driving.evaluator import AGENT_FILES, Drive, Evaluator, Expert, _into, carla
from tests.driving.served import Straight, serving

CLIENT_FILES = ("client", "bench2drive_agent", "bench2drive_control", "bench2drive_rig", "bench2drive_route")


@pytest.fixture(scope="module")
def town():
    return town_of(0, "boston-seaport")


def turn_route(town, turn, pick=None):
    """Over the junction with the widest left or the tightest right turn, and its place on the route."""
    lanes = [lane for lane in town.lanes.values() if lane.road is not None and length(lane) > 45]
    turns = [
        (length(town.lanes[key]), lane.key, key)
        for lane in lanes
        for key in lane.successors
        if town.lanes[key].turn == turn and town.junctions[lane.junction].signalised
    ]
    _, before, over = (pick or (min if turn == "right" else max))(turns)
    route = traffic.lane_route(town, [before, over, town.lanes[over].successors[0]])
    return route, route.gates[0]


def length(lane):
    return lane.length


def drives(town):
    for number, turn in enumerate(("straight", "left", "right")):
        route, gate = turn_route(town, turn)
        yield Drive(number, f"Turn{turn}", route, max(gate.enter - 30, 2.0), gate.leave + 20)
    route, gate = turn_route(town, "straight")
    yield Drive(3, "Stop", route, max(gate.enter - 40, 2.0), gate.leave, stop=gate.stop, start_speed=5.0)


@pytest.fixture
def expert_server():
    """A server whose policy knows where the evaluator's car is."""
    holder = {}
    policy = Expert(lambda: holder["evaluator"])
    with serving(policy) as server:
        holder.update(server=server, policy=policy)
        yield holder


def evaluator_of(holder, options="", **more):
    url = holder["server"].url
    holder["evaluator"] = Evaluator(f"{url}{options}", **more)
    holder["policy"]._near = 0.0
    return holder["evaluator"]


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_follows_the_experts_plan(expert_server, town, preset):
    evaluator = evaluator_of(expert_server, f"?controller={preset}")
    for drive in drives(town):
        expert_server["policy"]._near = 0.0
        record = evaluator.run(drive)
        assert record["status"] == "Perfect", (drive.scenario, record["status"])
        assert evaluator.farthest < 1.0, (drive.scenario, evaluator.farthest)
        if drive.stop is not None:
            s, _ = drive.route.project(evaluator.car.origin, drive.stop)
            assert evaluator.car.speed < 0.1
            assert drive.stop - 4 < s < drive.stop


def test_zoos_target_point_leads_off_a_wide_turn(expert_server, town):
    """Its rule prefers the junction's exit to the plan; it can be switched off."""
    route, gate = turn_route(town, "right", max)
    wide = Drive(4, "WideRight", route, gate.enter - 30, gate.leave + 20)
    off = []
    for option in ("", "&target_point=0"):
        evaluator = evaluator_of(expert_server, f"?controller=zoo{option}")
        assert evaluator.run(wide)["status"] == "Perfect"
        off.append(evaluator.farthest)
    assert off[0] > 1.5
    assert off[1] < 1.0


def test_files_of_a_drive(expert_server, town, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAVE_PATH", str(tmp_path / "saved"))
    evaluator = evaluator_of(expert_server, "?controller=zoo&video=40")
    drive = next(drives(town))
    evaluator.run(drive)
    evaluator.write(tmp_path / "results.json")
    folder = tmp_path / "saved" / drive.save_name
    steps = json.loads((folder / "metric_info.json").read_text())
    assert list(steps)[:2] == ["0", "1"]
    assert (folder / "CAM_FRONT" / "00040.jpg").is_file()
    assert (folder / "bev" / "00000.jpg").is_file()
    assert json.loads((folder / "plan" / "00040.json").read_text())["controls"]["brake"] in (0, 1)

    (tmp_path / "routes.txt").write_text("0\n")
    arguments = [str(tmp_path / "results.json"), "--routes", str(tmp_path / "routes.txt")]
    assert main(["score-bench2drive", *arguments, "--metric-info", str(tmp_path / "saved"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["driving_score"], facts["success_rate"], facts["missing"]) == (100, 100, 0)
    assert 0 <= facts["comfort"] <= 100


def test_what_the_model_is_told(expert_server, town):
    """History in the right frame and at the right times, commands and target points on the right side."""
    evaluator = evaluator_of(expert_server)
    _, left, right, _ = drives(town)
    for drive, side in ((left, 1), (right, -1)):
        seen = expert_server["policy"].seen
        seen.clear()
        expert_server["policy"]._near = 0.0
        evaluator.run(drive)
        assert [one["step"] for one in seen[:3]] == [0, 10, 20]
        assert [one["past_mask"].tolist() for one in seen[:3]] == [
            [False] * 4,
            [True, False, False, False],
            [True, True, False, False],
        ]
        words = {one["command"] for one in seen}
        assert (1 if side > 0 else 2) in words
        for before, now in itertools.pairwise(seen[3:]):
            # The pose 0.5 s ago lies where the speed says; its turn is the one of the yaw.
            moved = np.hypot(*now["past_to_ego"][0][:2, 3])
            mean = (before["can_bus"][10] + now["can_bus"][10]) / 2 * 0.5
            assert moved == pytest.approx(mean, abs=0.15)
        turned = [math.atan2(one["past_to_ego"][0][1, 0], one["past_to_ego"][0][0, 0]) for one in seen[1:]]
        assert np.sign(max(turned, key=abs)) == -side  # it stood turned the other way
        ahead = next(one for one in seen if one["command"] in (1, 2))
        last = ahead["target_points"][1]
        assert last[0] > 0
        assert np.sign(last[1]) == side or abs(last[1]) < 2


def test_a_model_that_reads_lidar_gets_whole_sweeps(expert_server, town):
    """Two half turns, both in the frame of where the car is when it asks."""
    policy, (_, left, _, _) = expert_server["policy"], drives(town)
    middle = left.route.pose(np.array([left.start + 25.0]))[0, :2]
    marks = middle + 30 * np.stack([np.cos(np.arange(8.0)), np.sin(np.arange(8.0))], axis=1)
    x, y, z = LIDAR

    def sweep(car, tick):
        here = _into(car, marks)  # y to the left
        columns = (here[:, 0] - x, -here[:, 1] - y, np.full(len(marks), 0.5 - z), np.arange(8.0))
        return np.stack(columns, axis=1).astype(np.float32)

    seen = []

    def prepare(message):
        points = np.frombuffer(message["lidar"], "<f4").reshape(-1, 5)
        places = np.insert(_into(expert_server["evaluator"].car, marks), 2, 0.5, axis=1)
        seen.append((len(points), np.abs(points[:, :3] - places[points[:, 3].astype(int)]).max()))
        return partial_record(message)

    policy.metadata = policy.metadata | {"depth": ["unidepth", "lidar"]}
    policy.prepare = prepare
    evaluator = evaluator_of(expert_server, "?every=30")
    short = dataclasses.replace(left, sweep=sweep, end=left.start + 40)
    assert evaluator.run(short)["status"] == "Perfect"
    assert len(seen) > 5
    assert {count for count, _ in seen} >= {8}
    assert max(off for _, off in seen) < 0.05
    del policy.prepare
    policy.seen.clear()
    evaluator_of(expert_server, "?lidar=0").run(dataclasses.replace(left, end=left.start + 3))
    assert "lidar" not in policy.seen[0]


def test_plan_is_moved_between_calls(expert_server, town):
    """Asked only every 40 ticks, the car still stays on the route, for the plan is followed in the world."""
    evaluator = evaluator_of(expert_server, "?every=40&controller=hip_ad")
    _, left, _, _ = drives(town)
    record = evaluator.run(left)
    assert record["status"] == "Perfect"
    assert evaluator.farthest < 1.0


def test_sensors_that_fail(expert_server, town):
    """NaN compass and GPS, a camera that comes late: the drive goes on."""

    def disturb(tick, data):
        if tick % 50 < 5:
            data["IMU"][1][-1] = math.nan
            data["GPS"][1][:2] = math.nan
        if tick % 40 == 1:
            del data["CAM_BACK"]  # late by a tick
        if tick < 13:
            data.pop("CAM_FRONT", None)  # nothing yet at the first call

    evaluator = evaluator_of(expert_server, disturb=disturb)
    _, left, _, _ = drives(town)
    record = evaluator.run(left)
    assert record["status"] == "Perfect"
    assert evaluator.farthest < 1.0


def test_server_is_killed_and_started_again_in_mid_route(town, monkeypatch):
    holder = {}
    policy = Expert(lambda: holder["evaluator"])
    with serving(policy) as first:
        port = first.port

        def stop(tick, data):
            if tick == 60:
                first.stop()

        holder["evaluator"] = Evaluator(f"ws://127.0.0.1:{port}", disturb=stop)
        monkeypatch.setattr(
            holder["evaluator"].module.PolicyClient.__init__, "__defaults__", (None, 0.1, 30.0)
        )
        done, restarted = threading.Event(), threading.Event()

        def again():
            import time as clock

            while first._healthy:
                clock.sleep(0.05)
            clock.sleep(0.5)
            with serving(policy, port=port):
                restarted.set()
                done.wait(60)

        thread = threading.Thread(target=again)
        thread.start()
        drive = next(drives(town))
        record = holder["evaluator"].run(drive)
    done.set()
    thread.join(20)
    assert restarted.is_set()
    assert record["status"] == "Perfect"


def test_refused_observation_fails_its_route_only(town):
    with serving(Straight()) as server:
        evaluator = Evaluator(server.url)

        def unlucky(tick, data):
            data["SPEED"][1]["speed"] = math.inf

        evaluator.disturb = unlucky
        drive = next(drives(town))
        record = evaluator.run(drive)
        assert record["status"].startswith("Failed - Agent crashed")
        assert "can_bus holds values that are not finite" in record["status"]


def test_an_evaluation_is_one_policys(expert_server, tmp_path, monkeypatch):
    monkeypatch.setenv("SAVE_PATH", str(tmp_path / "saved"))

    def set_up(options):
        evaluator = evaluator_of(expert_server, options)
        agent = getattr(evaluator.module, evaluator.module.get_entry_point())("localhost", 2000, False)
        try:
            agent.setup(f"{evaluator.config}+first")
        finally:
            agent.destroy()

    set_up("?controller=zoo&patience=9")
    set_up("?controller=zoo&video=5")
    with pytest.raises(ValueError, match="with controller zoo, every 10, not controller hip_ad, every 1:"):
        set_up("?controller=hip_ad&every=1")
    policy = expert_server["policy"]
    policy.metadata = policy.metadata | {"weights": "other"}
    with pytest.raises(ValueError, match=r"driven with weights .*, not weights other"):
        set_up("?controller=zoo")


EVALUATOR = """
import json, os, pathlib, sys
flags = dict(each.lstrip("-").partition("=")[::2] for each in sys.argv[1:])
ids = [line.split('"')[1] for line in pathlib.Path(flags["routes"]).read_text().split("<route ")[1:]]
assert pathlib.Path(flags["agent"]).is_file() and pathlib.Path(os.environ["SAVE_PATH"]).is_dir()
file = pathlib.Path(flags["checkpoint"])
records = json.loads(file.read_text())["_checkpoint"]["records"] if "resume" in flags else []
records.append(f"RouteScenario_{ids[len(records)]}_rep0")  # then it crashes, as CARLA does
file.write_text(json.dumps({"_checkpoint": {"records": records, "progress": [len(records), len(ids)]}}))
sys.exit(len(records) < len(ids))
"""


def test_launch_scripts_go_on_from_wherever_they_are_called(tmp_path):
    (tmp_path / "b2d/leaderboard/leaderboard").mkdir(parents=True)
    (tmp_path / "b2d/leaderboard/leaderboard/leaderboard_evaluator.py").write_text(EVALUATOR)
    (tmp_path / "my routes.xml").write_text(
        "<routes>" + "".join(f'<route id="{number}" town="Town01"/>' for number in range(3)) + "</routes>"
    )
    for name in ("carla", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/sleep").write_text("#!/bin/sh\n")
    (tmp_path / "bin/score").write_text("#!/bin/sh\necho scored $@\n")
    for tool in (tmp_path / "bin").iterdir():
        tool.chmod(0o755)
    names = {"BENCH2DRIVE": "b2d", "CARLA_ROOT": "carla", "ROUTES": "my routes.xml"}
    tools = {"CARLA_PYTHON": sys.executable, "PYTHON": "bin/score"}
    env = os.environ | names | tools | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def launch(workers):
        script = ROOT / "configs" / "launch" / "bench2drive_workers.sh"
        command = ["bash", str(script), workers, "ws://127.0.0.1:1", "eval/first"]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    for _ in range(2):  # the second finds all done
        done = launch("2")
        assert done.returncode == 0, done.stderr
        assert "scored -m spacedrive_jax score-bench2drive eval/first/results_00.json" in done.stdout
        found = [json.loads(file.read_text()) for file in sorted((tmp_path / "eval/first").glob("*.json"))]
        assert [one["_checkpoint"]["progress"] for one in found] == [[2, 2], [1, 1]]
    more = launch("3")
    assert more.returncode == 1
    assert "begun with 2 workers, or other routes" in more.stderr


def test_config_text():
    read = Evaluator("ws://x:1").module.read_config
    server, options, name = read("ws://host:8000?controller=zoo&every=1&speed_cap=5+first+second")
    assert (server, name) == ("ws://host:8000", "second")
    assert (options.controller, options.every, options.speed_cap, options.creep) == ("zoo", 1, 5.0, "")
    for text, said in (
        ("team_code/config.py+model.pth", "names no policy server"),
        ("ws://h:1?speed=5", "unknown options: speed"),
        ("ws://h:1?every=often", "every='often' is no int"),
        ("ws://h:1?every=0", "every must be 1 or more"),
        ("ws://h:1?every=1&every=10", "gives an option twice"),
        ("ws://h:1?speed_cap=nan&patience=-1", "speed_cap, patience must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            read(text)


def test_rig():
    assert camera_intrinsics("CAM_FRONT")[0, 0] == pytest.approx(1142.5184, abs=1e-4)
    assert camera_intrinsics("CAM_BACK")[0, 0] == pytest.approx(560.1660, abs=1e-4)
    assert camera_intrinsics("CAM_FRONT")[:2, 2].tolist() == [800, 450]
    left = camera_to_ego("CAM_FRONT_LEFT")
    np.testing.assert_allclose(left[:3, 3], [0.27, 0.55, 1.6], atol=1e-9)
    np.testing.assert_allclose(left[:3, 2], [0.5736, 0.8192, 0], atol=1e-4)
    for name in RIG:
        assert np.linalg.det(camera_to_ego(name)) == pytest.approx(1)


@pytest.mark.skipif(carla is None, reason="no carla wheel for this machine")
@pytest.mark.parametrize("name", RIG)
def test_camera_matrices_project_as_unreal_does(name):
    """A world point through CARLA's own matrices of a pitched and rolled car, and through ours."""
    x, y, z, yaw, _ = RIG[name]
    pose = carla.Transform(carla.Location(10, -20, 0.5), carla.Rotation(pitch=4, yaw=37, roll=-6))
    mount = carla.Transform(carla.Location(x, y, z), carla.Rotation(yaw=yaw))
    ego, camera = np.array(pose.get_matrix()), np.array(mount.get_matrix())
    mirror = np.diag([1.0, -1, 1, 1])
    local = np.array([[0.5, 0.3, 7.0, 1.0], [-1.0, 0.8, 12.0, 1.0]]).T  # in our camera
    ours = mirror @ ego @ mirror @ camera_to_ego(name) @ local
    theirs = np.linalg.inv(ego @ camera) @ (mirror @ ours)  # x forward, y right, z up of UE's camera
    np.testing.assert_allclose(np.stack([theirs[1], -theirs[2], theirs[0]]), local[:3], atol=1e-5)


def test_ego_numbers_mirror_axial_vectors():
    """A left turn is positive here; CARLA's yaw rate and lateral axis have the other sign."""
    numbers = ego_numbers(0.6, [1.0, -2.0, 9.8, 0.1, 0.2, -0.3, 0.0], 5.0)
    np.testing.assert_allclose(numbers[:4], [math.cos(0.3), 0, 0, math.sin(0.3)])
    np.testing.assert_allclose(numbers[4:], [1, 2, 9.8, -0.1, 0.2, 0.3, 5, 0, 0])


@pytest.mark.parametrize("name", CLIENT_FILES)
def test_client_files_are_python_3_7_and_import_little(name):
    tree = ast.parse((AGENT_FILES / f"{name}.py").read_text(), feature_version=(3, 7))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    allowed = {"carla", "cv2", "leaderboard", "msgpack", "numpy", "spacedrive_jax", "websockets"}
    assert imported <= allowed | set(CLIENT_FILES) | set(sys.stdlib_module_names)


def test_agent_runs_in_carlas_python():
    """The agent's own file in a Python of CARLA's age: setup, calls and destroy against a server of today."""
    python = os.environ.get("SPACEDRIVE_OLD_PYTHON", "python3.7")
    packages = "import cv2, msgpack, numpy, websockets"
    found = shutil.which(python) and subprocess.run([python, "-c", packages], capture_output=True)
    if not found or found.returncode:
        pytest.skip(f"{python} has not all of: {packages} (SPACEDRIVE_OLD_PYTHON names another)")
    policy = Straight()
    policy.metadata = {**policy.metadata, "depth": ["lidar"]}
    with serving(policy) as server:
        done = subprocess.run(
            [
                python,
                str(AGENT_FILES.parents[1] / "tests" / "driving" / "old_python.py"),
                str(AGENT_FILES),
                server.url,
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert "drove 25 ticks" in done.stdout
    assert all(len(one["lidar"]) == 100 * 20 for one in policy.seen)

"""The loop: same bytes for any number of workers and after a resume; failures are counted, not fatal."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spacedrive_jax.cli.drive import Drive
from spacedrive_jax.cli.main import main
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.driving.bench import Bench, Finished, PlanRequest
from spacedrive_jax.driving.drive import DriveRun, Show, drive_all, open_folder
from spacedrive_jax.driving.driver import FailureKind, Plan, PlanError, checked_plan
from spacedrive_jax.driving.episode import MOST_FAILURES, DriveOptions, _ending
from spacedrive_jax.driving.policies import constant_velocity, expert, standing_still
from spacedrive_jax.driving.scenarios import DriveSpec, drive_set
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.evaluation.bench2drive import read_results, score_routes
from spacedrive_jax.folders import output_lock
from spacedrive_jax.training.hosts import ALONE, Hosts
from spacedrive_jax.world.vehicle import VehicleState
from tests.conftest import ROOT
from tests.driving.hand_made import make_world

SPECS = [DriveSpec(0, "start", "boston-seaport", 0), DriveSpec(1, "bend", "singapore-onenorth", 1)]
METADATA = {"set": "test", "image_size": (27, 48)}
BLIND = DriveOptions(sense="nothing")
SEEING = DriveOptions(image_size=(27, 48), depth=True)


@dataclasses.dataclass
class Scripted:
    """A policy that answers what it is told, and remembers what it was asked."""

    answers: Sequence[object]
    most: int = 2
    requests: list[PlanRequest] = dataclasses.field(default_factory=list)

    def plans(self, requests: Sequence[PlanRequest]) -> Mapping[int, Plan | PlanError]:
        self.requests += requests
        result: dict[int, Plan | PlanError] = {}
        for request in requests:
            answer = self.answers[min(request.decision, len(self.answers) - 1)]
            try:
                if isinstance(answer, PlanError):
                    raise answer
                result[request.number] = checked_plan(answer)
            except PlanError as error:
                result[request.number] = error
        return result

    def close(self) -> None:
        """Nothing."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drives") / "one"
    drive_all(SPECS, folder, BLIND, metadata=METADATA, world_policy=constant_velocity, workers=1)
    return folder


def test_workers_and_a_broken_off_run_change_no_byte(driven: Path, tmp_path: Path) -> None:
    shutil.copytree(driven, tmp_path / "two")
    lost = tmp_path / "two" / "drives" / SPECS[1].name / "result.json"
    lost.unlink()  # as after kill -9: result.json is a drive's last file
    run = drive_all(
        SPECS,
        tmp_path / "two",
        BLIND,
        metadata=METADATA,
        world_policy=constant_velocity,
        workers=2,
        resume=True,
    )
    assert run.driven == 1
    assert contents(tmp_path / "two") == contents(driven)


def test_a_run_of_before_a_part_of_the_score_is_not_gone_on_with(driven: Path, tmp_path: Path) -> None:
    """Means would be of some of its drives."""
    shutil.copytree(driven, tmp_path / "old")
    known = json.loads((tmp_path / "old" / "run.json").read_text())
    assert known.pop("pdm_parts")[-1] == "extended_comfort"
    (tmp_path / "old" / "run.json").write_text(json.dumps(known))
    with pytest.raises(ConfigError, match="begun with another pdm_parts"):
        drive_all(SPECS, tmp_path / "old", BLIND, metadata=METADATA, resume=True)


def test_what_the_scripts_own_driver_fails_is_excused() -> None:
    """It cuts a kerb with a corner where it starts; the expert goes the same way."""
    drive = Bench(BLIND, expert).start(SPECS[0])
    assert isinstance(drive, Finished)
    pdm = drive.record["pdm"]
    assert (pdm["drivable_area"], pdm["pdms"]) == (0.0, 0.0)
    assert pdm["epdms"] > 0.9


def hosts_in_threads(count: int, work: Callable[[Hosts], Any]) -> list[Any]:
    """What each host's work came to; bytes are exchanged as between processes."""
    barrier, given = threading.Barrier(count, timeout=60), [b""] * count

    def host(index: int) -> Any:
        def exchange(data: bytes) -> list[bytes]:
            given[index] = data
            barrier.wait()
            told = list(given)
            barrier.wait()
            return told

        return work(Hosts(index, count, exchange))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(host, range(count)))


@pytest.mark.parametrize("shared", [True, False])
def test_hosts_drive_their_shares_to_the_bytes_of_one(driven: Path, tmp_path: Path, shared: bool) -> None:
    """On one disk, and each on its own."""

    def folder(hosts: Hosts) -> Path:
        return tmp_path / ("disk" if shared else f"disk-{hosts.index}")

    shutil.copytree(driven, folder(ALONE))
    if not shared:
        (logs,) = (path.name for path in (driven / "metric_info").iterdir() if "bend" in path.name.lower())
        shutil.rmtree(folder(ALONE) / "drives" / SPECS[1].name)
        shutil.rmtree(folder(ALONE) / "metric_info" / logs)

    def drive(hosts: Hosts) -> DriveRun:
        options = {"metadata": METADATA, "world_policy": constant_velocity, "resume": True, "hosts": hosts}
        return drive_all(SPECS, folder(hosts), BLIND, **options)

    first, second = hosts_in_threads(2, drive)
    assert (first.driven, second.driven) == (0, 0 if shared else 1)
    assert first.summary == second.summary
    assert contents(folder(ALONE)) == contents(driven)


@pytest.mark.slow
def test_two_processes_are_two_hosts(driven: Path, tmp_path: Path) -> None:
    """Each with a disk of its own, over JAX's own network."""
    drives = [{"kind": spec.kind, "town": spec.town, "seed": spec.seed} for spec in SPECS]
    (tmp_path / "set.json").write_text(json.dumps(drives))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "spacedrive_jax", "drive", "--policy", "constant_velocity"]
    command += ["--scenarios", str(tmp_path / "set.json"), "--workers", "1"]
    command += ["--coordinator", f"localhost:{port}", "--num-processes", "2"]
    hosts = [
        subprocess.Popen(
            [*command, "--process-id", str(index), "--out", str(tmp_path / str(index))], cwd=ROOT
        )
        for index in range(2)
    ]
    try:
        assert [host.wait(300) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.kill()
    first, one = contents(tmp_path / "0"), contents(driven)
    del one["run.json"]  # says how they were driven
    assert {name: first[name] for name in one} == one
    assert not (tmp_path / "1" / "results.json").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_four_workers_to_the_same_bytes(tmp_path: Path) -> None:
    places = ("boston-seaport", "singapore-onenorth")
    drives = [{"kind": "start", "town": town, "seed": seed} for seed in range(2) for town in places]
    (tmp_path / "set.json").write_text(json.dumps(drives))
    command = [sys.executable, "-m", "spacedrive_jax", "drive", "--policy", "constant_velocity"]
    command += ["--scenarios", str(tmp_path / "set.json"), "--out"]
    killed, whole = tmp_path / "killed" / "drives", tmp_path / "whole" / "drives"
    with subprocess.Popen([*command, str(killed), "--workers", "1"]) as process:
        while not list(killed.glob("drives/*/result.json")):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert not (killed / "results.json").exists()
    subprocess.run([*command, str(killed), "--workers", "4", "--resume"], check=True)
    subprocess.run([*command, str(whole), "--workers", "1"], check=True)
    assert contents(killed) == contents(whole)


def test_another_run_is_not_gone_on_with(driven: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        drive_all(SPECS, driven, BLIND, metadata=METADATA, world_policy=constant_velocity)
    with pytest.raises(ConfigError, match="another set"):
        drive_all(
            SPECS,
            driven,
            BLIND,
            metadata=METADATA | {"set": "other"},
            world_policy=constant_velocity,
            resume=True,
        )
    moved = METADATA | {"scenarios": "/moved/scenarios.json"}  # the drives themselves are named too
    assert len(open_folder(driven, moved, resume=True)) == len(SPECS)
    (tmp_path / "file").write_text("something else")
    with pytest.raises(ConfigError, match="not a run"):
        drive_all(SPECS, tmp_path, BLIND, metadata={}, world_policy=constant_velocity)


def test_speeds_are_perturbed_with_the_rest_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--perturb-speed perturbs more of what --perturb does"):
        Drive(policy="expert", scenarios="tiny", perturb_speed=True, out=tmp_path / "drives").run()
    assert not (tmp_path / "drives").exists()


def test_what_is_otherwise_than_in_the_run_begun_is_named(tmp_path: Path) -> None:
    options = {"controller": "lqr", "lidar": False}
    assert open_folder(tmp_path, {"options": options, "policy": "expert"}, resume=False) == set()
    (tmp_path / "drives" / "one").mkdir(parents=True)
    (tmp_path / "drives" / "one" / "result.json").write_text("{}")
    assert open_folder(tmp_path, {"options": options, "policy": "expert"}, resume=True) == {"one"}
    for changed, named in (("controller", "zoo"), ("lidar", True)):
        with pytest.raises(ConfigError, match=rf"another options\.{changed}, policy: choose"):
            open_folder(tmp_path, {"options": options | {changed: named}, "policy": None}, resume=True)


def test_a_start_that_failed_burns_no_folder(tmp_path: Path) -> None:
    (tmp_path / "drives" / "one").mkdir(parents=True)
    (tmp_path / "run.json").write_text('{"set": "before"}')
    assert open_folder(tmp_path, {"set": "now"}, resume=False) == set()
    assert json.loads((tmp_path / "run.json").read_text())["set"] == "now"
    assert not (tmp_path / "drives").exists()
    (tmp_path / "checkpoints").mkdir()  # as a run of training has it
    with pytest.raises(ConfigError, match="holds a run"):
        open_folder(tmp_path, {"set": "other"}, resume=False)


def test_a_second_job_on_the_same_folder_gives_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "drives"
    with output_lock(folder):
        assert main(["drive", "--policy", "constant_velocity", "--out", str(folder)]) == 1
    assert f"{folder} is in use by process" in capsys.readouterr().err
    assert not folder.exists()


def test_the_scorer_reads_what_was_written(driven: Path) -> None:
    summary = json.loads((driven / "summary.json").read_text())
    routes = json.loads((driven / "routes.json").read_text())
    scores = score_routes(read_results([driven / "results.json"]), routes)
    assert scores.driving_score == pytest.approx(summary["driving_score"])
    assert not scores.inconsistent
    names = {result.save_name for result in read_results([driven / "results.json"])}
    assert names == {path.name for path in (driven / "metric_info").iterdir()}


NONSENSE = [np.zeros((5, 2)), np.full((6, 2), np.nan), "no numbers", PlanError(FailureKind.LATE, "asleep")]


def test_a_policy_that_never_answers_fails_its_drive_and_is_named(tmp_path: Path) -> None:
    policy = Scripted(NONSENSE)
    run = drive_all(SPECS[:1], tmp_path / "out", SEEING, metadata={}, policy=policy)
    assert run.summary["driving_score"] < 1.0
    assert run.summary["statuses"] == {"Failed - Agent crashed": 1}
    assert run.summary["failures"] == {"late": MOST_FAILURES - 3, "nonsense": 2, "not finite": 1}
    assert [len(request.record["images"]) for request in policy.requests] == [6] * MOST_FAILURES
    assert policy.requests[0].record["images"][0][:2] == b"\xff\xd8"


def test_one_bad_answer_does_not_end_a_drive(tmp_path: Path) -> None:
    still = np.zeros((6, 2))
    policy = Scripted([still, np.full((6, 2), np.inf), still])
    options = dataclasses.replace(SEEING, sense="status")
    run = drive_all(SPECS[:1], tmp_path / "out", options, metadata={}, policy=policy)
    assert run.summary["failures"] == {"not finite": 1}
    assert "Failed - Agent crashed" not in run.summary["statuses"]


def raise_always(world, record) -> Plan:
    raise ZeroDivisionError("oops")


def test_a_crash_of_a_policy_is_a_failure_of_its_drive(tmp_path: Path) -> None:
    run = drive_all(SPECS[:1], tmp_path / "out", BLIND, metadata={}, world_policy=raise_always)
    assert run.summary["failures"] == {"crash": MOST_FAILURES}


def test_one_drive_is_shown_with_images_though_nobody_looks(tmp_path: Path) -> None:
    shown: list[Finished] = []
    options = dataclasses.replace(BLIND, image_size=(27, 48))
    arguments: dict[str, Any] = {"metadata": {}, "world_policy": raise_always, "show": Show(0, shown.append)}
    drive_all(SPECS[:1], tmp_path / "out", options, **arguments)
    (drive,) = shown
    assert len(drive.records) == len(drive.trace["decisions"]) == MOST_FAILURES
    assert all(image[:2] == b"\xff\xd8" for record in drive.records for image in record["images"])
    assert drive.trace["wrong_at"] is not None
    views = sorted(path.name for path in (tmp_path / "out" / "drives" / SPECS[0].name / "views").iterdir())
    assert views == sorted(f"{camera}.jpg" for camera in CAMERAS)
    with pytest.raises(ConfigError, match=r"that drive of .* is done"):
        drive_all(SPECS[:1], tmp_path / "out", options, resume=True, **arguments)
    arguments["show"] = Show(7, shown.append)
    with pytest.raises(ConfigError, match="drives 0 to 0"):
        drive_all(SPECS[:1], tmp_path / "other", options, **arguments)


def test_open_loop_counts_plans_made_where_the_script_drove(driven: Path) -> None:
    """Of constant velocity at the start of `start` none is far off: the script stands there as well."""
    for spec in SPECS:
        result = json.loads((driven / "drives" / spec.name / "result.json").read_text())
        trace = json.loads((driven / "drives" / spec.name / "trace.json").read_text())
        assert 1 <= result["open_loop"]["decisions"] < len(trace["decisions"])
        assert 0.0 < result["open_loop"]["l2"] < 20.0


@pytest.mark.parametrize(
    ("changed", "ending"),
    [
        ({"s": 99.7}, ""),
        ({"s": 99.76}, "goal"),  # the last quarter metre of a route of 20 m
        ({"aside": -29.9}, ""),
        ({"aside": 30.1}, "deviated"),
        ({"in_a_row": MOST_FAILURES - 1}, ""),
        ({"in_a_row": MOST_FAILURES}, "crashed"),
        ({"still": 199}, ""),
        ({"still": 200}, "blocked"),
        ({"time": 29.9}, ""),
        ({"time": 30.0}, "timeout"),
    ],
)
def test_why_a_drive_ends(changed: Mapping[str, float], ending: str) -> None:
    now = {"s": 85.0, "aside": 0.0, "in_a_row": 0, "still": 0, "time": 10.0} | dict(changed)
    places = [(now["time"], s, VehicleState(s, now["aside"] - 1.75, 0.0, 0.0)) for s in (80.0, now["s"])]
    world = make_world(*places)
    found = _ending(world, 100.0, world.scenario, 0, 30.0, int(now["in_a_row"]), int(now["still"]))
    assert found == ending


def test_standing_still_scores_next_to_nothing(tmp_path: Path) -> None:
    run = drive_all(SPECS[:1], tmp_path / "out", BLIND, metadata={}, world_policy=standing_still)
    assert run.summary["driving_score"] < 15


def test_sets_and_files_of_drives(tmp_path: Path) -> None:
    specs = drive_set("full")
    assert len({spec.name for spec in specs}) == len(specs) >= 220
    path = tmp_path / "set.json"
    path.write_text('[{"kind": "start", "town": "boston-seaport", "seed": 3}]')
    assert drive_set(str(path)) == [DriveSpec(0, "start", "boston-seaport", 3)]
    path.write_text('[{"kind": "start", "town": "boston-seaport", "seed": 3, "world": 7}]')
    assert drive_set(str(path)) == [DriveSpec(0, "start", "boston-seaport", 3, world=7)]
    assert not {spec.world for spec in drive_set("train")} & {spec.world for spec in specs}
    for bad, said in (
        ('[{"kind": "fly", "town": "boston-seaport", "seed": 3}]', "no scenario 'fly'"),
        ('[{"kind": "start", "town": "atlantis", "seed": 3}]', "no town"),
        ('[{"kind": "start", "town": "boston-seaport", "seed": -1}]', "seed"),
        ('{"kind": 1}', "not a list"),
    ):
        path.write_text(bad)
        with pytest.raises(DataError, match=said):
            drive_set(str(path))
    with pytest.raises(ConfigError, match="choose full"):
        drive_set("nowhere")

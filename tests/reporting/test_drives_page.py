"""The page of a run of drives, on a drive made by hand."""

from __future__ import annotations

import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.driving.bench import Finished, NoPlace
from spacedrive_jax.driving.drive import finish, write_drive
from spacedrive_jax.driving.infractions import went_wrong
from spacedrive_jax.driving.results import drive_record, metric_info, trace
from spacedrive_jax.driving.scenarios import DriveSpec
from spacedrive_jax.errors import DataError
from spacedrive_jax.reporting.drives import film, planned, run_rows, scatter, score_table, strip, write_page
from spacedrive_jax.reporting.figures import PREDICTION
from tests.driving.hand_made import LANES, Other, cruise, make_log
from tests.record_factory import encode_jpeg

DECISION = {
    "time": 0.0,
    "pose": [10.0, -1.75, 0.0],
    "waypoints": [[4.0, 0.0]] * 6,
    "path": None,
    "failure": "",
}


def test_a_run_of_before_extended_comfort_has_none_and_no_extended_score(tmp_path: Path) -> None:
    new, old = write_run(tmp_path / "new", ()), write_run(tmp_path / "old", ())
    for path in (old / "summary.json", old / "results.json", next(old.glob("drives/*/result.json"))):
        text = path.read_text()
        assert '"extended_comfort": null,' in text
        path.write_text(text.replace('"extended_comfort": null,', ""))
    for run, others in ((new, [old]), (old, [new])):
        parts = {row.name: row.parts for row in run_rows(run, others)}
        assert "extended_comfort" not in parts["old"]
        assert "epdms" not in parts["old"]
        assert (parts["new"]["extended_comfort"], parts["new"]["epdms"]) == (None, 1.0)
        assert write_page(run, others).read_text().count("<td>–</td>") == 3


def write_run(folder: Path, others: tuple[Other, ...]) -> Path:
    spec = DriveSpec(0, "cruise", "boston-seaport", 0)
    log = make_log(cruise(140.0), others=others)
    record = drive_record(
        log,
        LANES,
        index=0,
        number=0,
        kind="cruise",
        town=spec.town,
        ending="goal",
        expert_metres=140.0,
        decisions=(),
        failures={},
    )
    wrong = went_wrong(log, LANES, "goal")
    wrong_at = None if wrong is None else 0.1 * wrong
    record["open_loop"] = {"l2": 0.5 if others else 1.5, "decisions": 2}
    shown = {**trace(log), "ending": "goal", "decisions": [DECISION], "wrong_at": wrong_at}
    image = encode_jpeg(np.full((45, 80, 3), 128, np.uint8))
    views = () if wrong is None else (image,) * len(CAMERAS)
    write_drive(folder, spec, Finished(0, record, metric_info(log), shown, views=views))
    finish([spec], folder)
    return folder


def test_the_page_holds_runs_against_each_other_and_shows_what_went_wrong(tmp_path: Path) -> None:
    hit = write_run(tmp_path / "hit", (Other("vehicle.car", np.array([60.0, -1.75, 0.0])),))
    clean = write_run(tmp_path / "clean", ())
    text = write_page(hit, [clean]).read_text()
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert "+40.0" in text  # the other run's driving score is higher by so much
    assert "Agent collided against vehicle.car" in text
    assert text.count("<animateTransform") == 2  # the ego vehicle moves, the parked car does not
    assert "when it first went wrong" in text
    assert text.count("data:image/jpeg;base64,") == 1
    assert text.count("<circle") == 2
    assert "<td>0.50</td>" in text
    lines = score_table(run_rows(hit, [clean])).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["clean", "100.0"], ["hit", "60.0"]]
    assert "<td>–</td>" in text  # nobody made two plans to be compared
    alone = write_page(clean).read_text()
    assert "Nothing." in alone
    assert "<circle" not in alone


def test_film_and_curves_are_whole_pictures(tmp_path: Path) -> None:
    along = np.stack([cruise(140.0) + 20, np.full(176, 1.75), np.zeros(176)], axis=1)
    log = make_log(cruise(140.0), others=(Other("vehicle.bicycle", along, 8.0),))
    shown = {**trace(log), "decisions": [DECISION]}
    picture = xml.etree.ElementTree.fromstring(film(shown))
    assert len(list(picture.iter("animateTransform"))) == 4
    assert len(list(picture.iter("animate"))) == 1
    curves = xml.etree.ElementTree.fromstring(strip({**shown, "wrong_at": 8.8}))
    lines = [line for line in curves.iter("polyline") if line.get("stroke") == PREDICTION]
    assert len(lines) == 3  # the one plan's speed, acceleration and steering
    (mark,) = curves.iter("line")
    assert float(mark.get("x1", "0")) == pytest.approx(520 * 8.8 / (0.1 * (len(log.time) - 1)), abs=0.1)


def test_a_plan_to_the_left_steers_left_and_one_that_slows_brakes() -> None:
    ego = [[0.0, 0.0, 0.0, 8.0, 0.0, 0.0]] * 31
    plan = [[4.0, 0.0], [7.0, 2.0], [9.0, 2.0], [10.0, 2.0], [10.0, 2.0], [10.0, 2.0]]
    shown = {"step_s": 0.1, "ego": ego, "decisions": [DECISION | {"waypoints": plan}]}
    speeds, accelerations, angles = planned(shown)
    assert speeds[0][0].tolist() == [0.25, 8.0]
    assert accelerations[0][0, 1] == pytest.approx((np.hypot(3, 2) - 4) / 0.25)
    assert angles[0][0, 1] == pytest.approx(np.degrees(np.arctan(2.588 * 4 / 53)))
    still = planned({**shown, "decisions": [DECISION | {"waypoints": [[0.0, 0.1]] * 6}]})
    assert still[2][0][0, 1] == 0.0


def test_runs_stand_against_each_other_where_two_have_an_open_loop_error() -> None:
    assert scatter([("alone", 1.0, 50.0, None)]) == ""
    picture = xml.etree.ElementTree.fromstring(
        scatter([("a & b", 0.5, 20.0, (10.0, 30.0)), ("b", 1.0, 80.0, None)])
    )
    left, right = ((float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in picture.iter("circle"))
    assert left[0] < right[0]
    assert left[1] > right[1]  # the better score stands higher
    assert "a & b" in [text.text for text in picture.iter("text")]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"summary\.json"):
        write_page(tmp_path)


def test_a_run_without_a_single_drive_has_a_page_too(tmp_path: Path) -> None:
    spec = DriveSpec(0, "cruise", "boston-seaport", 0)
    write_drive(tmp_path, spec, NoPlace(0, "no straight road is long enough"))
    finish([spec], tmp_path)
    assert "Nothing was driven" in write_page(tmp_path).read_text()


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("summary.json", '"failures"', '"failure"', "`failures`"),
        ("summary.json", '"driving_score":', '"driving_score": "<script>", "x":', "`str`"),
        ("results.json", '"status": "', '"status": 1, "x": "', "Expected `str`, got `int`"),
        ("trace.json", '"step_s"', '"step"', "`step_s`"),
        ("result.json", '"score_composed":', '"score_composed": 1e9, "x":', "<= 100"),
    ],
)
def test_files_that_are_not_what_drive_wrote_are_named(
    tmp_path: Path, file: str, old: str, new: str, said: str
) -> None:
    run = write_run(tmp_path / "run", (Other("vehicle.car", np.array([60.0, -1.75, 0.0])),))
    path = next(run.rglob(file))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=rf"{file}: .*{said}"):
        write_page(run)

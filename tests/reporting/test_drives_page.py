"""The page of a run of drives, on a drive made by hand."""

from __future__ import annotations

import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from spacedrive_jax.driving.bench import Finished, NoPlace
from spacedrive_jax.driving.drive import finish, write_drive
from spacedrive_jax.driving.results import drive_record, metric_info, trace
from spacedrive_jax.driving.scenarios import DriveSpec
from spacedrive_jax.errors import DataError
from spacedrive_jax.reporting.drives import film, strip, write_page
from tests.driving.hand_made import LANES, Other, cruise, make_log

DECISION = {
    "time": 0.0,
    "pose": [10.0, -1.75, 0.0],
    "waypoints": [[4.0, 0.0]] * 6,
    "path": None,
    "failure": "",
}


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
        failures={},
    )
    shown = {**trace(log), "ending": "goal", "decisions": [DECISION]}
    write_drive(folder, spec, Finished(0, record, metric_info(log), shown))
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
    assert "Nothing." in write_page(clean).read_text()


def test_film_and_curves_are_whole_pictures(tmp_path: Path) -> None:
    along = np.stack([cruise(140.0) + 20, np.full(176, 1.75), np.zeros(176)], axis=1)
    log = make_log(cruise(140.0), others=(Other("vehicle.bicycle", along, 8.0),))
    shown = {**trace(log), "decisions": [DECISION]}
    picture = xml.etree.ElementTree.fromstring(film(shown))
    assert len(list(picture.iter("animateTransform"))) == 4
    assert len(list(picture.iter("animate"))) == 1
    assert xml.etree.ElementTree.fromstring(strip(shown)).tag == "svg"


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

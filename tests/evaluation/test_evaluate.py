from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import shapely

from spacedrive_jax.cli.evaluate import Evaluate
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.evaluation.collision import Grid, drivable_rasters
from spacedrive_jax.evaluation.evaluate import evaluate, obstacles_of
from spacedrive_jax.evaluation.prediction_files import read_predictions
from spacedrive_jax.evaluation.predictions import constant_velocity, mean_trajectory
from spacedrive_jax.evaluation.protocols import PROTOCOLS, protocol_named
from tests.record_factory import make_record, straight_road, write_records

NO_FUTURE = np.array([1, 1, 1, 1, 1, 0], bool)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def no_agents() -> dict[str, object]:
    return {
        "agent_token": [],
        "agent_category": [],
        "agent_boxes": np.zeros((0, 7)),
        "agent_velocity": np.zeros((0, 2)),
        "agent_future": np.zeros((0, 6, 2)),
        "agent_future_yaw": np.zeros((0, 6)),
        "agent_future_mask": np.zeros((0, 6), bool),
        "agent_lidar_points": np.zeros(0, np.int32),
    }


def car_ahead(x: float, category: str = "vehicle.car") -> dict[str, object]:
    return {
        "agent_token": ["car"],
        "agent_category": [category],
        "agent_boxes": np.array([[x, 0.0, 0.8, 4.5, 1.9, 1.6, 0.0]]),
        "agent_velocity": np.zeros((1, 2)),
        "agent_future": np.zeros((1, 6, 2)),
        "agent_future_yaw": np.zeros((1, 6)),
        "agent_future_mask": np.ones((1, 6), bool),
        "agent_lidar_points": np.ones(1, np.int32),
    }


def ahead(step: float, sideways: float = 0.0) -> np.ndarray:
    return np.stack([step * np.arange(1, 7), sideways * np.arange(1, 7)], axis=1)


def predict(path: Path, plans: dict[str, np.ndarray]) -> Path:
    lines = [
        json.dumps({"token": token, "waypoints": plan.tolist(), "text": "", "status": "ok"})
        for token, plan in plans.items()
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Four val keyframes: a clear road, a car ahead, a person ahead, one without a whole future."""
    still = ahead(0.0)
    val = [
        make_record(rng, token="clear", waypoints=ahead(2.0), **no_agents()),
        make_record(rng, token="car", waypoints=still, **car_ahead(10)),
        make_record(rng, token="person", waypoints=still, **car_ahead(10, "human.pedestrian.adult")),
        make_record(rng, token="last", waypoint_mask=NO_FUTURE),
    ]
    train = [
        make_record(rng, token="t0", waypoints=ahead(1.0)),
        make_record(rng, token="t1", waypoints=ahead(3.0), waypoint_mask=NO_FUTURE),
    ]
    return write_records(tmp_path / "records", {"train": train, "val": val})


def test_scores_by_hand(folder: Path, tmp_path: Path) -> None:
    plans = {"clear": ahead(2.0, 1.0), "car": ahead(2.0), "person": ahead(2.0), "last": ahead(2.0)}
    path = predict(tmp_path / "p.jsonl", plans)
    results = evaluate(open_records(folder, "val"), read_predictions(path), list(PROTOCOLS.values()))
    scores = results["omnidrive"].to_json()
    assert scores["samples"] == 3
    # Errors at the six steps: 1..6 m sideways for one sample, 2..12 m ahead for two.
    assert scores["l2"]["1s"] == pytest.approx((1.5 + 3 + 3) / 3)
    assert scores["l2"]["3s"] == pytest.approx((3.5 + 7 + 7) / 3)
    # The car 10 m ahead is met at the third step; the person counts as no obstacle.
    assert scores["collision"]["1s"] == 0
    assert scores["collision"]["2s"] == scores["collision"]["3s"] == pytest.approx(100 / 3)
    # The road is 12 m wide: 1 m a step sideways leaves it at the fifth or sixth step only.
    assert scores["intersection"]["2s"] == 0
    assert scores["intersection"]["3s"] == pytest.approx(100 / 3)
    assert results["uniad"].to_json()["l2"]["3s"] == pytest.approx((6 + 12 + 12) / 3)
    assert results["vad"].to_json()["collision"]["3s"] == pytest.approx(100 / 3 * 4 / 6, rel=0.3)


def test_baselines(folder: Path, tmp_path: Path) -> None:
    path = predict(tmp_path / "p.jsonl", {"clear": ahead(2.0)})
    result = evaluate(open_records(folder, "val"), read_predictions(path), [protocol_named("omnidrive")])
    result = result["omnidrive"].to_json()
    assert result["samples"] == 1
    assert result["l2"]["avg"] == 0
    baselines = result["baselines"]
    assert set(baselines) == {"standing_still", "constant_velocity", "mean_trajectory", "ground_truth"}
    assert all(scores["samples"] == 3 for scores in baselines.values())
    assert baselines["standing_still"]["l2"]["1s"] == pytest.approx((2 + 4) / 2 / 3)
    assert baselines["ground_truth"]["l2"]["avg"] == 0
    assert any("2 keyframes of the train split" in note for note in result["notes"])


def test_ground_truth_collisions_are_shown(tmp_path: Path, rng: np.random.Generator) -> None:
    """A recorded drive that touches another box excuses the prediction, and shows in its own row."""
    record = make_record(rng, token="touch", waypoints=ahead(2.0), **car_ahead(10))
    folder = write_records(tmp_path / "records", {"val": [record]})
    path = predict(tmp_path / "p.jsonl", {"touch": ahead(2.0)})
    result = evaluate(open_records(folder, "val"), read_predictions(path), [protocol_named("omnidrive")])
    result = result["omnidrive"].to_json()
    assert result["collision"]["3s"] == 0
    assert result["baselines"]["ground_truth"]["collision"]["3s"] == 100
    assert "mean_trajectory" not in result["baselines"]
    assert any("no train split" in note for note in result["notes"])


def test_coverage_lists_everything_not_scored(folder: Path, tmp_path: Path) -> None:
    path = predict(tmp_path / "p.jsonl", {"clear": ahead(2.0), "t0": ahead(1.0), "nowhere": ahead(1.0)})
    with path.open("a") as lines:
        lines.write('{"token": "car", "waypoints": [], "status": "unparsed"}\n')
        lines.write('{"token": "clear", "waypoints": [], "status": "unparsed"}\n')
    result = evaluate(open_records(folder, "val"), read_predictions(path), [protocol_named("vad")])
    coverage = result["vad"].to_json()["coverage"]
    assert (coverage["records"], coverage["eligible"], coverage["counted"]) == (4, 3, 1)
    assert coverage["share"] == pytest.approx(1 / 3)
    listed = {name: item["tokens"] for name, item in coverage.items() if isinstance(item, dict)}
    assert {name: tokens for name, tokens in listed.items() if tokens} == {
        "missing": ["person"],
        "unparsed": ["car"],
        "duplicates": ["clear"],
        "wrong_split": ["t0"],
        "unknown": ["nowhere"],
    }


def test_nothing_to_score_is_an_error(folder: Path, tmp_path: Path) -> None:
    path = predict(tmp_path / "p.jsonl", {"t0": ahead(1.0), "last": ahead(1.0)})
    with pytest.raises(
        SpaceDriveError, match=r"none of the 2 predictions .*1 predicted tokens are in the split"
    ):
        evaluate(open_records(folder, "val"), read_predictions(path), [protocol_named("omnidrive")])


def test_split_without_annotations_says_nothing_about_collisions(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """v1.0-test ships none: no number, and a note, instead of a flattering zero."""
    records = [make_record(rng, token=token, **no_agents()) for token in "ab"]
    folder = write_records(tmp_path / "r", {"val": records})
    file = predict(tmp_path / "p.jsonl", {token: ahead(2.5) for token in "ab"})
    split = open_records(folder, "val")
    for name in ("omnidrive", "corrected"):
        result = evaluate(split, read_predictions(file), [protocol_named(name)])[name]
        result = result.to_json()
        assert set(result["collision"].values()) == {None}
        assert result["l2"]["avg"] is not None
        assert any("annotated" in note for note in result["notes"])
        assert {value for table in result["baselines"].values() for value in table["collision"].values()} == {
            None
        }


def test_no_map_gives_null(tmp_path: Path, rng: np.random.Generator) -> None:
    bare = {"drivable_source": "none", "drivable_fine": b""}
    records = [make_record(rng, token="a", **bare), make_record(rng, token="b", **bare)]
    path = predict(tmp_path / "p.jsonl", {"a": ahead(1.0), "b": ahead(1.0)})
    command = Evaluate(path, write_records(tmp_path / "bare", {"val": records}))
    result = command.run()
    assert set(result["intersection"].values()) == {None}
    assert any("No intersection" in note for note in result["notes"])
    records.append(make_record(rng, token="c"))
    result = Evaluate(path, write_records(tmp_path / "mixed", {"val": records})).run()
    assert set(result["intersection"].values()) == {None}
    path = predict(tmp_path / "p.jsonl", {name: ahead(0.5) for name in "abc"})
    result = Evaluate(path, tmp_path / "mixed").run()
    assert result["intersection"]["avg"] == 0
    assert result["coverage"]["with_map"] == 1
    assert any("over the 1 of 3 counted" in note for note in result["notes"])


def test_command_writes_what_it_returns(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = predict(tmp_path / "run.jsonl", {"clear": ahead(2.0)})
    result = Evaluate(path, folder, protocol="uniad").run()
    written = json.loads((tmp_path / "run.uniad.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert written["records"]["fingerprint"] == open_records(folder, "val").fingerprint
    table = capsys.readouterr().out
    for text in ("uniad protocol", "constant_velocity", "ground_truth", "coverage: 1 of 3", "missing: 2"):
        assert text in table
    Evaluate(path, folder, out=tmp_path / "elsewhere.json").run()
    assert json.loads((tmp_path / "elsewhere.json").read_text())["protocol"] == "omnidrive"
    with pytest.raises(SpaceDriveError, match="does not exist"):
        Evaluate(path, folder, out=tmp_path / "no" / "where.json").run()
    assert not list(tmp_path.glob(".*.partial"))


def test_constant_velocity(rng: np.random.Generator) -> None:
    past = np.stack([np.eye(4)] * 2)
    past[0, :2, 3] = [-3.0, 0.6]
    now = 1_600_000_000_000_000
    record = make_record(rng, past_to_ego=past, past_timestamp_us=np.array([now - 600_000, 0]))
    np.testing.assert_allclose(constant_velocity(record)[0], [2.5, -0.5])
    np.testing.assert_allclose(constant_velocity(record)[5], [15.0, -3.0])
    start = make_record(rng, past_mask=np.zeros(2, bool), past_to_ego=np.zeros((2, 4, 4)))
    assert not constant_velocity(start).any()
    with pytest.raises(SpaceDriveError, match="past_timestamp_us is not before"):
        constant_velocity({**record, "past_timestamp_us": np.array([now, 0])})


def test_mean_trajectory_uses_valid_waypoints_only(rng: np.random.Generator) -> None:
    records: list[Record] = [
        make_record(rng, waypoints=ahead(1.0)),
        make_record(rng, waypoints=ahead(3.0), waypoint_mask=NO_FUTURE),
    ]
    mean = mean_trajectory(records)
    np.testing.assert_allclose(mean[:5], ahead(2.0)[:5])
    np.testing.assert_allclose(mean[5], [6.0, 0.0])
    with pytest.raises(SpaceDriveError, match="valid in none of the training records"):
        mean_trajectory(records[1:])


def test_obstacles_come_from_vehicles_only(rng: np.random.Generator) -> None:
    record = make_record(rng, **car_ahead(10))
    record["agent_future"] = np.full((1, 6, 2), 1.5)
    np.testing.assert_array_equal(obstacles_of(record).centre[0], np.full((6, 2), [11.5, 1.5]))
    assert len(obstacles_of({**record, "agent_category": ["movable_object.barrier"]}).size) == 0


def test_drivable_rasters_agree_with_the_geometry(rng: np.random.Generator) -> None:
    """A road along x for |y| < 6 m: rows are y, whichever source the coarse raster has."""
    grids = [Grid(0.1), Grid(0.5)]
    fine, sampled = drivable_rasters(make_record(rng), grids).values()
    assert fine.shape == (1000, 1000)
    assert (np.flatnonzero(fine.all(axis=1)) == np.arange(440, 560)).all()
    assert (np.flatnonzero(sampled.all(axis=1)) == np.arange(88, 112)).all()
    road = shapely.to_wkb(shapely.box(-50, -6, 50, 6))
    drawn = drivable_rasters(make_record(rng, drivable_polygons=[road]), grids)[grids[1]]
    # fillPoly includes its border, so the devkit's raster reaches one cell further up.
    assert (np.flatnonzero(drawn.all(axis=1)) == np.arange(88, 113)).all()


def test_damaged_drivable_raster_is_an_error(rng: np.random.Generator) -> None:
    for damaged in (b"", b"\x89PNG nothing", straight_road()[:10, :10]):
        record = make_record(rng, token="bad")
        record["drivable_fine"] = (
            make_record(rng, drivable_fine=damaged)["drivable_fine"]
            if isinstance(damaged, np.ndarray)
            else damaged
        )
        with pytest.raises(SpaceDriveError, match="keyframe bad: drivable_fine"):
            drivable_rasters(record, [Grid(0.1)])


def test_agent_driver_on_the_real_scenes(nuscenes_real: Path) -> None:
    """Published predictions on real keyframes: L2 as measured with the official devkit."""
    from spacedrive_jax.evaluation.metrics import horizon_scores, score_steps, stack_scores, summarize

    ego = np.load(nuscenes_real / "expected" / "ego.npz")
    samples = json.loads((nuscenes_real / "expected" / "samples.json").read_text())["samples"]
    tokens = [sample["token"] for sample in samples]
    plans = json.loads((nuscenes_real / "predictions" / "agent_driver_mini.json").read_text())
    empty = obstacles_of({**no_agents()})
    rows = [tokens.index(token) for token in plans if ego["future_mask"][tokens.index(token)].all()]
    scores = stack_scores(
        [
            score_steps(
                np.array(plans[tokens[row]])[None],
                ego["future_xy"][row],
                empty,
                None,
                protocol_named("omnidrive").steps,
            )
            for row in rows
        ]
    )
    oracle = json.loads((nuscenes_real / "expected" / "l2_agent_driver.json").read_text())
    expected = oracle["results"]["all"]["ego_origin"]
    assert len(rows) == expected["n"]
    mean = summarize(horizon_scores(scores, protocol_named("omnidrive")))["l2"]
    end = summarize(horizon_scores(scores, protocol_named("uniad")))["l2"]
    for seconds in (1, 2, 3):
        assert mean[f"{seconds}s"] == pytest.approx(expected[f"avg_to_{seconds}s"], abs=1e-6)
        assert end[f"{seconds}s"] == pytest.approx(expected[f"at_{seconds}s"], abs=1e-6)


def test_unusable_answers_are_failures_when_corrected(folder: Path, tmp_path: Path) -> None:
    path = predict(tmp_path / "p.jsonl", {"clear": ahead(2.0), "car": ahead(1.0)[:4]})
    with path.open("a") as lines:
        lines.write('{"token": "person", "waypoints": [], "status": "unparsed"}\n')
    result = Evaluate(path, folder, protocol="corrected").run()
    assert (result["samples"], result["failures"]) == (3, 2)
    assert result["coverage"]["counted"] == 3
    for metric in ("collision", "intersection"):
        assert result[metric]["3s"] == pytest.approx(200 / 3)
    assert result["l2"]["avg"] == 0  # both recorded vehicles stand still, and so does a failure
    assert any("2 unusable answers count as colliding" in note for note in result["notes"])
    result = Evaluate(path, folder, protocol="omnidrive").run()
    assert (result["samples"], result["failures"]) == (1, 0)


def test_pedestrians_are_obstacles_on_request(folder: Path, tmp_path: Path) -> None:
    path = predict(tmp_path / "p.jsonl", {"person": ahead(2.0)})
    assert Evaluate(path, folder, protocol="corrected").run()["collision"]["2s"] == 0
    result = Evaluate(path, folder, protocol="corrected", pedestrians=True).run()
    assert result["collision"]["2s"] == 100
    assert result["pedestrians"] is True
    with pytest.raises(SpaceDriveError, match="use it with --protocol corrected"):
        Evaluate(path, folder, pedestrians=True).run()


def test_comparison_is_paired(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = predict(tmp_path / "p.jsonl", {"clear": ahead(2.0), "car": ahead(2.0)})
    other = predict(tmp_path / "q.jsonl", {"clear": ahead(1.0), "person": ahead(0.0)})
    comparison = Evaluate(path, folder, compare=other).run()["comparison"]
    assert (comparison["samples"], comparison["only_here"], comparison["only_there"]) == (1, 1, 1)
    assert comparison["here"]["l2"]["1s"] == 0
    assert comparison["there"]["l2"]["1s"] == pytest.approx(1.5)
    assert comparison["difference"]["l2"]["1s"] == pytest.approx(-1.5)
    assert comparison["nearer_share"] == {"1s": 1, "2s": 1, "3s": 1}
    assert "here - there" in capsys.readouterr().out
    apart = predict(tmp_path / "r.jsonl", {"person": ahead(0.0)})
    with pytest.raises(SpaceDriveError, match="shares no scored keyframe"):
        Evaluate(path, folder, compare=apart).run()


def test_processes_change_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spacedrive_jax.evaluation.evaluate.CHUNK_KEYFRAMES", 2)
    path = predict(tmp_path / "p.jsonl", {"clear": ahead(2.0, 1.0), "car": ahead(2.0)})
    one, two = (
        evaluate(
            open_records(folder, "val"), read_predictions(path), list(PROTOCOLS.values()), workers=workers
        )
        for workers in (1, 2)
    )
    for name in PROTOCOLS:
        assert one[name].to_json() == two[name].to_json()


def test_mean_trajectory_of_a_large_split_is_of_evenly_spaced_keyframes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spacedrive_jax.evaluation.predictions.MEAN_KEYFRAMES", 2)
    rng = np.random.default_rng(0)
    train = [make_record(rng, token=f"t{index}", waypoints=ahead(float(index))) for index in range(3)]
    val = [make_record(rng, token="v", waypoints=ahead(1.0), **no_agents())]
    records = write_records(tmp_path / "large", {"train": train, "val": val})
    path = predict(tmp_path / "p.jsonl", {"v": ahead(1.0)})
    result = Evaluate(path, records).run()
    assert result["baselines"]["mean_trajectory"]["l2"]["avg"] == 0  # of the first and the third: 1 m a step
    assert any("2 evenly spaced of the 3 keyframes" in note for note in result["notes"])


def test_read_only_predictions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores are shown all the same; a file that was asked for is an error, before any work."""
    path = predict(tmp_path / "p.jsonl", {"clear": ahead(2.0)})
    monkeypatch.setattr(os, "access", lambda *_: False)
    result = Evaluate(path, folder).run()
    assert result["file"] is None
    assert "not written" in capsys.readouterr().out
    assert not list(tmp_path.glob("p.omnidrive.json"))
    with pytest.raises(SpaceDriveError, match="cannot be written to"):
        Evaluate(path, folder, out=tmp_path / "x.json").run()

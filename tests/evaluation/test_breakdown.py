from __future__ import annotations

import numpy as np
import pytest

from spacedrive_jax.evaluation.metrics import (
    Comparison,
    HorizonScores,
    Situation,
    break_down,
    confidence,
    situation_of,
)
from tests.record_factory import make_record


def scores(l2: list[float]) -> HorizonScores:
    errors = np.array(l2)[:, None] * np.array([1.0, 2.0, 3.0])
    return HorizonScores(errors, (errors > 3).astype(float), np.full_like(errors, np.nan))


def at(speed: float = 1.0, turn: float = 0.0, command: int = 0) -> Situation:
    return Situation("token", "scene", command, speed, turn)


def test_facts_of_a_record() -> None:
    past = np.stack([np.eye(4)] * 2)
    past[0, :2, 3] = [-3.0, 4.0]
    record = make_record(
        np.random.default_rng(0),
        past_to_ego=past,
        waypoint_yaw=np.linspace(0, -np.pi / 6, 6),
        command_released=6,
    )
    situation = situation_of(record)
    assert situation.speed == pytest.approx(10.0)
    assert situation.turn == pytest.approx(30.0)
    assert situation.command == 6
    assert np.isnan(situation_of({**record, "past_mask": np.zeros(2, bool)}).speed)


def test_groups_are_disjoint_and_complete() -> None:
    situations = [at(0.0), at(0.5, 5.0, 2), at(9.9, 44.9, 2), at(10.0, 45.0, 7), at(float("nan"))]
    groups = break_down(scores([1, 2, 3, 4, 5]), situations)
    assert {name: group["samples"] for name, group in groups["speed"].items()} == {
        "under 0.5 m/s": 1,
        "0.5-5 m/s": 1,
        "5-10 m/s": 1,
        "from 10 m/s": 1,
        "unknown": 1,
    }
    assert list(groups["turn"]) == ["under 5 deg", "5-15 deg", "15-45 deg", "from 45 deg"]
    assert groups["command"]["slightly_left"]["l2"]["1s"] == pytest.approx(2.5)
    for group in groups.values():
        assert sum(each["samples"] for each in group.values()) == 5


def test_interval_of_equal_scenes_is_a_point() -> None:
    interval = confidence(scores([1, 3, 1, 3]), ["a", "a", "b", "b"])
    assert interval["l2"]["1s"] == [2.0, 2.0]
    assert interval["intersection"]["avg"] is None
    assert interval["scenes"] == 2


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    """40 scenes of 5 alike keyframes: intervals over scenes hold the true mean about 95 % of the time."""
    rng = np.random.default_rng(1)
    scenes = np.repeat(np.arange(40).astype(str), 5)
    hits = 0
    for _ in range(200):
        values = np.repeat(rng.normal(5.0, 1.0, 40), 5) + rng.normal(0, 0.2, 200)
        low, high = confidence(scores(list(values)), list(scenes))["l2"]["1s"]
        hits += low <= 5.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_one_scene_gives_no_interval() -> None:
    assert confidence(scores([1, 2]), ["a", "a"]) is None


def test_same_draws_every_time() -> None:
    values, scenes = scores(list(np.sqrt(np.arange(30)))), [str(scene) for scene in range(30)]
    assert confidence(values, scenes) == confidence(values, scenes)
    assert confidence(values, scenes) != confidence(values, scenes, seed=1)


def test_pairing_removes_what_is_common() -> None:
    """Two files that differ by 0.1 m everywhere: each mean is unsure, their difference is not."""
    common = [1.0, 5.0, 9.0, 2.0]
    ours, theirs = scores(common), scores([value + 0.1 for value in common])
    result = Comparison("other", ("a", "b", "c", "d"), ours, theirs, 0, 0).to_json()
    low, high = result["confidence"]["l2"]["1s"]
    assert (low, high) == (pytest.approx(-0.1), pytest.approx(-0.1))
    assert result["nearer_share"]["1s"] == 1.0

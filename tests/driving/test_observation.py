"""A drive cannot be told from a data set: its records are the converter's, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.cli import Convert, Synthesize
from data_prep.synthesize.recorder import town_of
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.driving.observation import Observer
from spacedrive_jax.world.filming import Film, Take
from spacedrive_jax.world.scenario import MANOEUVRES, build_scenario
from spacedrive_jax.world.world import World

SEED, KEYFRAMES = 4, 4
LOOKS_AHEAD = {
    "command_released",
    "waypoints",
    "waypoint_yaw",
    "waypoint_mask",
    "waypoint_timestamp_us",
    "path",
    "path_mask",
    *(f"agent_{name}" for name in ("token", "category", "boxes", "velocity", "future", "future_yaw")),
    "agent_future_mask",
    "agent_lidar_points",
    "past_command_released",
}


def same(first: Record, second: Record, name: str) -> bool:
    a, b = first[name], second[name]
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        a, b = np.asarray(a), np.asarray(b)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list) or isinstance(b, list):
        return list(a) == list(b)
    return bool(a == b)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    root = tmp_path_factory.mktemp("converted")
    world, records = root / "world", root / "records"
    Synthesize(out=world, scenes=1, keyframes=KEYFRAMES, seed=SEED, image_size="96x54", workers=1).run()
    Convert(dataroot=world, version="v1.0-synthetic", out=records, workers=1).run()
    found = [dict(record) for record in open_records(records)]
    return sorted(found, key=lambda record: record["frame_index"])


@pytest.fixture(scope="module")
def driven(converted: list[Record]) -> tuple[list[Record], list[Record]]:
    """Records as they were at each decision, and in hindsight."""
    take = Take(0, SEED, KEYFRAMES, (54, 96), True, "boston-seaport")
    scenario = build_scenario(
        town_of(SEED, take.location),
        MANOEUVRES[SEED % len(MANOEUVRES)],
        take.duration + 0.5,
        np.random.default_rng([SEED, 0, 2]),
    )
    world = World(scenario)
    world.reset(steered=False)
    observer = Observer(Film(take, scenario), scenario, lidar=True)
    at_decision = []
    for time in observer.film.times:
        while world.state.time < time - 0.05:
            world.step()
        at_decision.append(observer.look(world.recording()))
    return at_decision, [observer.record(index) for index in range(KEYFRAMES)]


def test_at_a_decision_all_that_does_not_look_ahead_is_the_converters(
    converted: list[Record], driven: tuple[list[Record], list[Record]]
) -> None:
    for seen, recorded in zip(driven[0], converted, strict=True):
        assert seen.keys() == recorded.keys()
        different = {name for name in seen if not same(seen, recorded, name)}
        assert different <= LOOKS_AHEAD
        assert len(seen["images"][0]) > 500
        assert len(seen["exact_depth"][0]) > 50


def test_in_hindsight_the_whole_record_is_the_converters(
    converted: list[Record], driven: tuple[list[Record], list[Record]]
) -> None:
    for seen, recorded in zip(driven[1], converted, strict=True):
        assert {name for name in seen if not same(seen, recorded, name)} == set()
    assert any(len(record["agent_token"]) > 3 for record in converted)


def test_nothing_of_the_future_is_in_an_observation(driven: tuple[list[Record], list[Record]]) -> None:
    for record in driven[0]:
        assert not record["waypoint_mask"].any()
        assert not record["waypoints"].any()
        assert record["route_valid"]

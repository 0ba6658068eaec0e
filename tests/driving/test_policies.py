"""The baselines: what each plans in states whose answer is known, and what those that learn have learnt."""

from __future__ import annotations

import numpy as np
import pytest

from spacedrive_jax.driving.policies import POLICIES, policy_named
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.world.traffic import Motion
from spacedrive_jax.world.vehicle import VehicleState
from spacedrive_jax.world.world import World
from tests.driving.hand_made import make_world
from tests.record_factory import make_record

SPEED = 8.0


def world_at(x: float, *, time: float = 1.0, steer: float = 0.0) -> World:
    """A script that drives along x at 8 m/s from 10 m on for 5 s, and a vehicle somewhere on its lane."""
    steps = 51
    script = Motion(10.0 + SPEED * 0.1 * np.arange(steps), np.full(steps, SPEED), np.zeros(steps))
    return make_world((time, x, VehicleState(x, -1.75, 0.0, SPEED, steer=steer)), motions=(script,))


def ahead(name: str, world: World) -> np.ndarray:
    return POLICIES[name](world, {}).waypoints


def test_the_replay_goes_where_the_script_was_whatever_happened() -> None:
    """The expert's open-loop replay: a vehicle that fell 3 m behind is to be where the script was."""
    plan = ahead("recorded", world_at(15.0))
    assert np.allclose(plan[:, 0], 3.0 + SPEED * 0.5 * np.arange(1, 7), atol=1e-6)
    assert np.allclose(plan[:, 1], 0.0, atol=1e-6)
    late = ahead("recorded", world_at(50.0, time=4.5))
    assert np.allclose(late[:, 0], 0.0, atol=1e-6)  # the recording is over: its end is held


def test_blind_planners_plan_what_they_say() -> None:
    world = world_at(20.0)
    times = 0.5 * np.arange(1, 7)
    assert np.allclose(ahead("constant_velocity", world), np.stack([SPEED * times, 0 * times], axis=1))
    assert np.allclose(ahead("route_constant_speed", world)[:, 0], 6.0 * times, atol=1e-6)
    assert not ahead("standing_still", world).any()
    turning = world_at(20.0, steer=0.1)
    arc = ahead("constant_yaw_rate", turning)
    assert (np.diff(arc[:, 1]) > 0).all()
    radius = 2.588 / np.tan(0.1)
    assert np.allclose(np.hypot(arc[:, 0], arc[:, 1] - radius), radius)


def test_those_that_learn_tell_fast_from_slow_or_do_not() -> None:
    """Every record drives straight on at its own speed: the mean is far off, the MLP reads the speed."""
    rng = np.random.default_rng(0)
    records = [make_record(rng) for _ in range(60)]
    train, held_out = records[:48], records[48:]
    errors = {}
    for name in ("mean_trajectory", "ego_mlp"):
        policy = policy_named(name, train)
        plans = [policy(world_at(20.0), record).waypoints for record in held_out]
        truth = [record["waypoints"] for record in held_out]
        errors[name] = float(np.linalg.norm(np.array(plans) - np.array(truth), axis=-1).mean())
    assert errors["mean_trajectory"] > 2.0
    assert errors["ego_mlp"] < 0.35 * errors["mean_trajectory"]


def test_what_they_learn_from_must_be_there() -> None:
    with pytest.raises(ConfigError, match="give --records"):
        policy_named("ego_mlp")
    with pytest.raises(ConfigError, match="no policy 'lucky'"):
        policy_named("lucky")
    record = make_record(np.random.default_rng(0), waypoint_mask=np.zeros(6, bool))
    with pytest.raises(DataError, match="whole future"):
        policy_named("ego_mlp", [record])

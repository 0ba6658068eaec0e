import dataclasses

import numpy as np
import pytest

from spacedrive_jax.batch import TokenType
from spacedrive_jax.config import load_config
from spacedrive_jax.constants import STATUS_SIZE
from spacedrive_jax.data.ego_status import ego_status, ego_status_in_words, remembered, with_ego_fault
from spacedrive_jax.data.transforms import SampleBuilder
from tests.conftest import ROOT
from tests.record_factory import encode_png, make_record


@pytest.mark.parametrize(("case", "stream"), [("qwen_B1_smalltime", 0), ("qwen_B2", 0), ("qwen_B2", 1)])
@pytest.mark.parametrize("frame", range(6))
def test_record_gives_what_the_published_memory_holds(golden, case, stream, frame):
    published = np.load(golden / "ego_memory" / "arrays.npz")

    def value(name, at):
        return published[f"{case}/f{at}/{name}"][stream].astype(np.float64)

    before = [frame - 1, frame - 2]
    present = np.array([index >= 0 for index in before])
    times = [round(float(value("timestamp", max(at, 0))) * 1e6) for at in (frame, *before)]
    world_to_ego = np.linalg.inv(value("ego_pose", frame))
    past = [world_to_ego @ value("ego_pose", at) if at >= 0 else np.zeros((4, 4)) for at in before]
    record = {
        "timestamp_us": times[0],
        "past_timestamp_us": np.array(times[1:]) * present,
        "past_mask": present,
        "past_to_ego": np.stack(past),
        "can_bus": value("can_bus", frame),
        "past_can_bus": np.stack([value("can_bus", at) if at >= 0 else np.zeros(13) for at in before]),
        "command_released": value("command", frame),
        "past_command_released": np.array([value("command", at) if at >= 0 else 0 for at in before]),
    }
    status = ego_status(record, "released")
    assert status.status.shape == (STATUS_SIZE,)
    memory_can = value("memory_canbus_at_forward", frame)
    memory_pose = value("memory_egopose_at_forward", frame)
    np.testing.assert_allclose(status.status[:28], memory_can.ravel(), atol=1e-6)
    np.testing.assert_allclose(status.status[42:], memory_pose.ravel(), atol=1e-3)
    np.testing.assert_allclose(status.past_positions, memory_pose[:, :3, 3], atol=1e-3)


@pytest.mark.parametrize(
    ("newest", "oldest", "kept"),
    [
        (1_999_999, 1_999_999, [True, True]),
        (2_000_000, 1, [False, False]),  # at the limit, and all that is older goes too
        (1, 2_000_000, [True, False]),
        (-2_000_000, 1, [False, False]),  # a clock that was set back
        (-1_999_999, 1, [True, True]),
        (0, 0, [True, True]),
    ],
)
def test_memory_is_dropped_at_a_gap_of_two_seconds_in_either_direction(newest, oldest, kept):
    record = make_record(np.random.default_rng(0))
    now = int(record["timestamp_us"])
    record["past_timestamp_us"] = np.array([now - newest, now - newest - oldest])
    assert remembered(record).tolist() == kept
    held = np.array(kept)[:, None]
    np.testing.assert_array_equal(
        ego_status(record, "none").past_positions, (record["past_to_ego"][:, :3, 3] * held).astype(np.float32)
    )


def test_without_a_command_sentence_nothing_of_the_endpoint_is_told():
    rng = np.random.default_rng(0)
    left = make_record(rng, command_released=7, past_command_released=np.array([7, 7], np.int32))
    right = {**left, "command_released": 4, "past_command_released": np.array([4, 4], np.int32)}
    np.testing.assert_array_equal(ego_status(left, "none").status, ego_status(right, "none").status)
    np.testing.assert_array_equal(
        ego_status(left, "navigation").status, ego_status(right, "navigation").status
    )
    assert not np.array_equal(ego_status(left, "released").status, ego_status(right, "released").status)


def test_in_words():
    rng = np.random.default_rng(0)
    can_bus = np.zeros(13)
    can_bus[[4, 9, 10]] = [0.3, -0.02, 7.5]
    past = np.stack([np.eye(4)] * 2)
    past[:, :2, 3] = [[-3.75, 0.0], [-7.5, 0.25]]
    record = make_record(rng, can_bus=can_bus, past_to_ego=past)
    said = (
        "The ego vehicle moves at +7.50 m/s, accelerates at +0.30 m/s^2 and turns at -0.02 rad/s. "
        "Its past positions are (-3.75, 0.0), (-7.50, +0.25). "
    )
    assert ego_status_in_words(record) == said
    no_past = {**record, "past_mask": np.zeros(2, bool)}
    assert ego_status_in_words(no_past) == said.split("Its past")[0]
    assert ego_status_in_words({**no_past, "can_bus_valid": False}) == ""
    gap = {**record, "past_timestamp_us": record["timestamp_us"] - np.array([500_000, 2_600_000])}
    assert ego_status_in_words(gap).endswith("Its past positions are (-3.75, 0.0). ")


def test_faults_of_the_ego_status():
    """A vehicle that drives 4 m a keyframe and turns by 0.1 rad: half a second ago it was told the same."""
    cos, sin = np.cos(0.1), np.sin(0.1)
    back = np.eye(4)
    back[:2, :2], back[:2, 3] = [[cos, sin], [-sin, cos]], [-4.0, 0.2]
    past = np.stack([back, back @ back])
    speeds = np.zeros((3, 13))
    speeds[:, 10] = [9.0, 8.0, 7.0]  # now, and at the two keyframes before
    record = make_record(
        np.random.default_rng(0),
        past_to_ego=past,
        can_bus=speeds[0],
        past_can_bus=speeds[1:],
        command_route=3,
    )
    assert with_ego_fault(record, "none") is record
    late = ego_status(with_ego_fault(record, "late"), "route").status
    np.testing.assert_allclose(late[:42].reshape(3, 14)[:, 11], [7.0, 7.0, 8.0])
    np.testing.assert_allclose(late[42:].reshape(2, 4, 4), past, atol=1e-6)
    lost = ego_status(with_ego_fault(record, "zero"), "route")
    assert lost.status.nonzero()[0].tolist() == [28]
    assert lost.status[28] == 3.0  # the command
    assert not lost.past_positions.any()
    assert ego_status_in_words(with_ego_fault(record, "zero")) == ""
    # Of the first two keyframes of a scene less is known.
    second = {**record, "past_mask": np.array([True, False])}
    late = ego_status(with_ego_fault(second, "late"), "route").status
    np.testing.assert_allclose(late[:42].reshape(3, 14)[:, 11], [8.0, 8.0, 8.0])
    first = {**record, "past_mask": np.zeros(2, bool)}
    np.testing.assert_array_equal(ego_status(with_ego_fault(first, "late"), "route").status, lost.status)


def test_the_question_says_it_and_no_tokens_are_inserted():
    config = load_config(str(ROOT / "tests" / "tiny_config.py"))
    png = encode_png(np.full((45, 80), 12.5 * 256, np.uint16))
    record = make_record(np.random.default_rng(0), exact_depth=[png] * 6)
    data = dataclasses.replace(config.data, sequence_length=320)
    said = ego_status_in_words(record)
    assert said
    for answer in (True, False):
        texts = {}
        for setting in ("none", "language"):
            model = dataclasses.replace(config.model, ego_status=setting)
            builder = SampleBuilder(data, model, answer=answer)
            sample = builder(record, 0)
            texts[setting] = builder.tokenizer.decode(sample.token_ids[: sample.lengths].tolist())
            assert not np.isin(sample.token_type_ids, [TokenType.EGO_FEATURE, TokenType.EGO_POSITION]).any()
        assert said in texts["language"]
        assert texts["language"].replace(said, "") == texts["none"]

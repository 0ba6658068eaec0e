import numpy as np
import pytest

from spacedrive_jax.data.ego_status import STATUS_SIZE, ego_status
from tests.record_factory import make_record


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


def test_without_a_command_sentence_nothing_of_the_endpoint_is_told():
    rng = np.random.default_rng(0)
    left = make_record(rng, command_released=7, past_command_released=np.array([7, 7], np.int32))
    right = {**left, "command_released": 4, "past_command_released": np.array([4, 4], np.int32)}
    np.testing.assert_array_equal(ego_status(left, "none").status, ego_status(right, "none").status)
    np.testing.assert_array_equal(
        ego_status(left, "navigation").status, ego_status(right, "navigation").status
    )
    assert not np.array_equal(ego_status(left, "released").status, ego_status(right, "released").status)

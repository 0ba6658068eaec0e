import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.batch import TokenType
from spacedrive_jax.config import load_config
from spacedrive_jax.data.images import CameraFault, scaled_intrinsics
from spacedrive_jax.data.loader import (
    Samples,
    evaluation_batches,
    position,
    seek,
    training_iterator,
    training_samples,
)
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.image_processor import CLIP_MEAN, CLIP_STD, normalise
from spacedrive_jax.models.unprojection import patch_centres
from tests.conftest import ROOT
from tests.record_factory import encode_jpeg, encode_png, make_record
from tests.training.runs import make_records, tiny

CONFIG = load_config(str(ROOT / "tests" / "tiny_config.py"))


def flat_depth(metres: float) -> list[bytes]:
    return [encode_png(np.full((45, 80), metres * 256, np.uint16))] * 6


@pytest.fixture
def record():
    return make_record(np.random.default_rng(3), exact_depth=flat_depth(12.5))


def test_sample_is_laid_out_for_the_model(record):
    builder = SampleBuilder(CONFIG.data, CONFIG.model)
    sample = builder(record, 7)
    rows, columns = builder.images.token_grid
    assert (rows, columns) == (2, 2)
    assert sample.index == 7
    counts = {slot: int((sample.token_type_ids == slot).sum()) for slot in TokenType}
    assert counts[TokenType.IMAGE] == 6 * rows * columns
    assert (counts[TokenType.EGO_FEATURE], counts[TokenType.EGO_POSITION], counts[TokenType.COORDINATE]) == (
        1,
        2,
        6,
    )
    assert sample.pixel_values.dtype == np.uint8
    np.testing.assert_allclose(sample.patch_depth, 12.5)
    np.testing.assert_allclose(sample.waypoints, record["waypoints"].astype(np.float32))
    assert sample.waypoint_mask.all()
    tokenizer = builder.tokenizer
    assert set(sample.token_ids[sample.waypoint_indices]) == {tokenizer.indicator}
    # Supervised tokens are predicted from the place before them.
    targets = sample.target_ids[sample.target_mask]
    np.testing.assert_array_equal(sample.token_ids[sample.target_indices[sample.target_mask] + 1], targets)
    assert tokenizer.decode(targets.tolist()).startswith("Here is the planning trajectory [")


@pytest.mark.parametrize("answer", [True, False])
def test_the_question_names_the_routes_nodes_and_says_where_they_are(record, answer):
    data = dataclasses.replace(CONFIG.data, target_points=True, max_coordinates=8, sequence_length=200)
    sample = SampleBuilder(data, CONFIG.model, answer=answer)(record, 0)
    nodes = np.flatnonzero(sample.token_type_ids == TokenType.TARGET_POINT)
    answered = np.flatnonzero(sample.token_type_ids == TokenType.COORDINATE)
    assert (len(nodes), len(answered)) == (2, 6 if answer else 0)
    np.testing.assert_array_equal(sample.coordinates[:2, :2], record["target_points"].astype(np.float32))
    if answer:
        assert nodes.max() < answered.min()
        np.testing.assert_array_equal(sample.coordinates[2:8, :2], sample.waypoints)
    assert not (
        SampleBuilder(CONFIG.data, CONFIG.model)(record, 0).token_type_ids == TokenType.TARGET_POINT
    ).any()


def test_a_route_beside_the_status_must_be_one_that_is_named():
    model = dataclasses.replace(CONFIG.model, ego_status="both", target_points_in_status=True)
    with pytest.raises(SpaceDriveError, match=r"target_points_in_status reads what data\.target_points"):
        SampleBuilder(CONFIG.data, model)


def test_position_tokens_can_be_supervised(record):
    talk = dataclasses.replace(CONFIG.data.conversation, supervise_position_tokens=True)
    data = dataclasses.replace(CONFIG.data, conversation=talk, max_targets=40)
    builder = SampleBuilder(data, CONFIG.model)
    plain, supervised = SampleBuilder(CONFIG.data, CONFIG.model)(record, 0), builder(record, 0)
    added = supervised.target_ids[supervised.target_mask] == builder.tokenizer.position
    assert added.sum() == 6
    assert supervised.target_mask.sum() == plain.target_mask.sum() + 6
    np.testing.assert_array_equal(supervised.waypoint_indices, plain.waypoint_indices)


def test_missing_future_gives_no_supervision(record):
    mask = np.array([True] * 5 + [False])
    sample = SampleBuilder(CONFIG.data, CONFIG.model)({**record, "waypoint_mask": mask}, 0)
    assert not sample.target_mask.any()
    assert not sample.waypoint_mask.any()
    assert not sample.waypoints.any()


def test_prompt_for_prediction_ends_in_the_assistant_header(record):
    builder = SampleBuilder(CONFIG.data, CONFIG.model, answer=False)
    sample = builder(record, 0)
    header = builder.tokenizer.encode("<|im_start|>assistant\n")
    length = int(sample.lengths)
    assert sample.token_ids[length - len(header) : length].tolist() == header
    # The answer must not leak into the prompt through any field but the ground truth to score against.
    assert not sample.coordinates.any()
    assert not sample.target_mask.any()


def test_what_does_not_fit_is_an_error(record):
    short = dataclasses.replace(CONFIG.data, sequence_length=64)
    with pytest.raises(SpaceDriveError, match=r"more than data\.sequence_length 64"):
        SampleBuilder(short, CONFIG.model)(record, 0)
    few = dataclasses.replace(CONFIG.data, max_targets=4)
    with pytest.raises(SpaceDriveError, match=r"more than data\.max_targets 4"):
        SampleBuilder(few, CONFIG.model)(record, 0)
    with pytest.raises(SpaceDriveError, match="has no CAM_FRONT image"):
        SampleBuilder(CONFIG.data, CONFIG.model)({**record, "images": [b""] * 6}, 0)
    with pytest.raises(SpaceDriveError, match="has no depth for CAM_FRONT from exact or lidar"):
        SampleBuilder(CONFIG.data, CONFIG.model)({**record, "exact_depth": [b""] * 6}, 0)
    decoder = dataclasses.replace(CONFIG.model.vlm.decoder, vocab_size=256)
    vlm = dataclasses.replace(CONFIG.model.vlm, decoder=decoder)
    with pytest.raises(SpaceDriveError, match="give the model's own tokenizer"):
        SampleBuilder(CONFIG.data, dataclasses.replace(CONFIG.model, vlm=vlm))


def test_pixels_reach_the_model_as_the_image_processor_would_hand_them_over(record):
    colour = np.zeros((45, 80, 3), np.uint8)
    colour[...] = (10, 100, 200)  # BGR
    images = [encode_jpeg(colour)] * 6
    sample = SampleBuilder(CONFIG.data, CONFIG.model)({**record, "images": images}, 0)
    processor = family_of(CONFIG.model.vlm).image_processor(CONFIG.model.vlm.vision, CONFIG.data.image_size)
    made = normalise(processor.view_patches(jnp.asarray(sample.pixel_values)))
    patches = np.asarray(made).reshape(6, -1, 3, 2 * 14 * 14)
    for channel, value in enumerate((200, 100, 10)):
        expected = (value / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        np.testing.assert_allclose(patches[:, :, channel], expected, atol=0.1)  # JPEG moves a few levels


def test_resized_intrinsics_keep_pixels_on_the_same_rays(record):
    resized = scaled_intrinsics(record, (56, 56))
    point = np.array([0.3, 0.2, 1.0])
    native = record["camera_intrinsics"][0] @ point
    moved = resized[0] @ point
    np.testing.assert_allclose(moved[:2], native[:2] * [56 / 80, 56 / 45])
    np.testing.assert_allclose(patch_centres((2, 2), 28)[1, 0], [14.0, 42.0])


def test_bad_conditions_for_the_cameras(record):
    def sample(fault):
        return SampleBuilder(dataclasses.replace(CONFIG.data, cameras=fault), CONFIG.model)(record, 0)

    sound = sample(CameraFault())
    lit = sound.pixel_values.astype(float)
    faulty = sample(CameraFault(dark=0.5, dead=("CAM_FRONT",), yaw=90.0, forward=2.0))
    assert not faulty.pixel_values[0].any()
    np.testing.assert_allclose(faulty.pixel_values[1:], lit[1:] / 2, atol=0.5)
    np.testing.assert_allclose(sample(CameraFault(fog=0.25)).pixel_values, 0.75 * lit + 0.25 * 200, atol=0.5)
    # A quarter turn to the left: what looked ahead (x) is said to look left (y).
    right, told = sound.camera_to_ego, faulty.camera_to_ego
    np.testing.assert_allclose(told[:, 1, :3], right[:, 0, :3], atol=1e-6)
    np.testing.assert_allclose(told[:, 0, :3], -right[:, 1, :3], atol=1e-6)
    np.testing.assert_allclose(told[:, :3, 3] - right[:, :3, 3], [[2.0, 0.0, 0.0]] * 6, atol=1e-6)
    np.testing.assert_array_equal(faulty.patch_depth, sound.patch_depth)
    with pytest.raises(ConfigError, match="there is no camera FRONT"):
        CameraFault(dead=("FRONT",))


@pytest.mark.usefixtures("unchecked")
def test_training_order_depends_on_the_seed_alone_and_resumes_anywhere():
    rng = np.random.default_rng(0)
    records = [make_record(rng, exact_depth=flat_depth(9.0)) for _ in range(6)]
    samples = Samples(records, SampleBuilder(CONFIG.data, CONFIG.model), list(range(6)), keep=True)
    first, again = (
        training_iterator(samples, CONFIG.data, batch_size=CONFIG.train.batch_size, seed=CONFIG.train.seed)
        for _ in range(2)
    )
    order = [next(first).index.tolist() for _ in range(5)]
    assert sorted(index for batch in order[:3] for index in batch) == sorted(list(range(6)) * 2)
    assert [next(again).index.tolist() for _ in range(2)] == order[:2]
    state = position(again, CONFIG.train.batch_size)
    resumed = training_iterator(
        samples, CONFIG.data, batch_size=CONFIG.train.batch_size, seed=CONFIG.train.seed
    )
    seek(resumed, state, CONFIG.train.batch_size)
    assert [next(resumed).index.tolist() for _ in range(3)] == order[2:]
    # A host makes the places of every batch that its devices hold, together or not.
    size, seed = CONFIG.train.batch_size, CONFIG.train.seed
    of_host = training_iterator(samples, CONFIG.data, batch_size=size, seed=seed, rows=[0, size - 1])
    assert [next(of_host).index.tolist() for _ in range(3)] == [[each[0], each[-1]] for each in order[:3]]


@pytest.mark.usefixtures("unchecked")
def test_evaluation_batches_cover_every_sample_once():
    rng = np.random.default_rng(0)
    records = [make_record(rng, exact_depth=flat_depth(9.0)) for _ in range(5)]
    samples = Samples(records, SampleBuilder(CONFIG.data, CONFIG.model), list(range(5)))
    batches = list(evaluation_batches(samples, 2))
    assert [count for _, count in batches] == [2, 2, 1]
    assert all(batch.size == 2 for batch, _ in batches)


@pytest.mark.usefixtures("unchecked")
def test_threads_make_the_same_batches_ahead():
    rng = np.random.default_rng(0)
    records = [make_record(rng, exact_depth=flat_depth(9.0)) for _ in range(5)]
    samples = Samples(records, SampleBuilder(CONFIG.data, CONFIG.model), list(range(5)))
    alone, ahead = (list(evaluation_batches(samples, 2, data=data)) for data in (None, CONFIG.data))
    assert [count for _, count in ahead] == [2, 2, 1]
    for (one, _), (other, _) in zip(alone, ahead, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    images = [b""] * 6
    broken = Samples([*records[:3], records[3] | {"images": images}], samples.builder, list(range(4)))
    with pytest.raises(SpaceDriveError, match="has no CAM_FRONT image"):
        list(evaluation_batches(broken, 2, data=CONFIG.data))


def test_worker_processes_make_the_same_batches_and_resume(tmp_path):
    config = tiny(make_records(tmp_path / "records", seed=1), tmp_path / "run")
    samples = training_samples(config.data, config.model, 2)
    data = dataclasses.replace(config.data, worker_processes=2, prefetch_batches=2)
    threads, processes = (
        training_iterator(samples, each, batch_size=2, seed=3) for each in (config.data, data)
    )
    seek(threads, {"samples": 4}, 2)
    seek(processes, {"samples": 4}, 2)
    with contextlib.closing(threads), contextlib.closing(processes):
        for _ in range(3):
            jax.tree.map(np.testing.assert_array_equal, next(threads), next(processes))
    assert position(processes, 2) == position(threads, 2) == {"samples": 10}

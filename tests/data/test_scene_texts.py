"""Texts about a keyframe from its record: nothing said that the record does not know."""

import dataclasses
import logging

import numpy as np
import pytest

from spacedrive_jax.config import change, load_config
from spacedrive_jax.data.conversation import ConversationConfig, training_conversation
from spacedrive_jax.data.language_data import ego_action, scene_objects, scene_questions, scene_reasons
from spacedrive_jax.data.loader import training_samples
from spacedrive_jax.data.survey import check_lengths
from spacedrive_jax.data.tokenizer import COORDINATE
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError
from tests.record_factory import encode_png, make_record
from tests.training.runs import TINY, make_records

CATEGORIES = ["vehicle.car", "human.pedestrian.adult", "vehicle.bus.rigid", "movable_object.barrier"]
BOXES = [(12, 0.5, 1, 4.5, 1.9, 1.6, 0), (4, 6, 1, 0.7, 0.7, 1.7, 0), (-20, -3, 1, 11, 2.9, 3.5, 0), (70, 0)]


@pytest.fixture
def record():
    """At 4 m/s behind a standing car, a pedestrian that crosses, a bus of which little is known."""
    depth = [encode_png(np.full((45, 80), 12.5 * 256, np.uint16))] * 6
    boxes = np.array([(*box, *[1.0] * (7 - len(box))) for box in BOXES], np.float64)
    future = np.zeros((4, 6, 2))
    future[1, :, 1] = -0.7 * np.arange(1, 7)
    mask = np.ones((4, 6), bool)
    mask[1, 4:], mask[2] = False, False
    return make_record(
        np.random.default_rng(3),
        exact_depth=depth,
        waypoints=np.stack([2.0 * np.arange(1, 7), np.zeros(6)], axis=1),
        agent_category=CATEGORIES,
        agent_token=["0" * 32] * 4,
        agent_boxes=boxes,
        agent_velocity=np.array([[0, 0], [0, -1.4], [np.nan, np.nan], [0, 0]]),
        agent_future=future,
        agent_future_yaw=np.repeat(boxes[:, 6:], 6, axis=1),
        agent_future_mask=mask,
        agent_lidar_points=np.full(4, 9, np.int32),
    )


def test_reasons_say_what_the_record_knows(record):
    assert scene_reasons(record) == (
        "There is a bus, a car and a pedestrian within 50 m. "
        "The car ahead at (+12.00, +0.50), on our path, stands still and will stay there for 3 s. "
        "The pedestrian ahead on the left at (+4.00, +6.00) moves to the right at 1.4 m/s and will be at "
        "(+4.00, +3.20) in 2 s. "
        "The bus behind at (-20.00, -3.00) has a speed that is not known. "
        "We keep our speed and go straight on."
    )


def test_nothing_is_invented_where_nothing_is_known(record):
    empty = {name: np.asarray(record[name])[:0] for name in record if name.startswith("agent_")}
    assert scene_reasons(record | empty) == (
        "There is nothing within 50 m. Our path is free. We keep our speed and go straight on."
    )
    unknown = record | {"waypoint_mask": np.zeros(6, bool)}
    asked = {pair.question for pair in scene_questions(unknown, np.random.default_rng(0))}
    assert not any("driving action" in question for question in asked)
    assert scene_objects(unknown)  # what stands there is known all the same


@pytest.mark.parametrize(
    ("steps", "side", "yaw", "said"),
    [
        ([0.1] * 6, 0, 0, "We stand still."),
        ([3, 2, 1, 0.5, 0, 0], 0, 0, "We stop and go straight on."),
        ([1, 1, 2, 2, 3, 3], 0, 0.3, "We speed up and turn left."),
        ([3, 3, 2, 2, 1, 1], -0.4, -0.1, "We slow down and move to the right."),
    ],
)
def test_what_follows_for_the_ego_vehicle(record, steps, side, yaw, said):
    points = np.stack([np.cumsum(steps), side * np.arange(1, 7)], axis=1)
    assert ego_action(record | {"waypoints": points, "waypoint_yaw": np.full(6, yaw)}) == said


def test_answers_are_those_of_the_record(record):
    answers = {}
    for seed in range(40):
        for pair in scene_questions(record, np.random.default_rng(seed)):
            answers.setdefault(pair.question, pair.answer)
            assert answers[pair.question] == pair.answer
    assert answers["How many cars are within 50 m?"] == "1."
    assert answers["How many barriers are within 50 m?"] == "0."  # it stands 70 m away
    assert answers["Where is the nearest bus?"] == "It is behind at (-20.00, -3.00)."
    assert answers["What is at (+12.00, +0.50)?"] == "A car."
    assert answers["What will the bus at (-20.00, -3.00) do?"] == "It has a speed that is not known."


def test_questions_alone_have_no_plan_and_never_change(record):
    config = ConversationConfig(tasks="questions", scene_texts=True)
    talks = [training_conversation(record, config, "navigation", coordinate_tokens=6) for _ in range(2)]
    assert talks[0].turns == talks[1].turns
    assert not any("trajectory" in turn.content for turn in talks[0].turns)
    assert sum("<image>" in turn.content for turn in talks[0].turns) == 1
    count = sum(turn.content.count(COORDINATE) for turn in talks[0].turns)
    assert count == len(talks[0].coordinates) > 0


def test_labels_cover_the_words_and_waypoints_stand_behind_them(record):
    config = change(
        load_config(str(TINY)),
        "think",
        {
            "data.conversation.tasks": "think_before_planning",
            "data.max_targets": 320,
            "data.sequence_length": 480,
            "data.max_coordinates": 16,
            "model.path_points": 2,
        },
    )
    builder = SampleBuilder(config.data, config.model)
    sample = builder(record, 0)
    labels = sample.target_ids[sample.target_mask]
    said = builder.tokenizer.decode(labels.tolist())
    assert said.startswith("There is a bus, a car and a pedestrian within 50 m. The car ahead at <POS_IND")
    assert "go straight on. Here is the planning trajectory [<POS_INDICATOR>" in said
    # Four coordinates of the words, then the waypoints, then the path.
    np.testing.assert_allclose(sample.coordinates[0], [12.0, 0.5, 0.0])
    np.testing.assert_allclose(sample.coordinates[4:10, :2], record["waypoints"])
    indicators = np.flatnonzero(sample.token_ids == builder.tokenizer.indicator)
    indicators = indicators[indicators >= sample.target_indices[0]]  # those before stand for past positions
    np.testing.assert_array_equal(sample.waypoint_indices, indicators[4:10])
    np.testing.assert_array_equal(sample.path_indices, indicators[10:12])
    question = SampleBuilder(config.data, config.model, answer=False).conversation(record).turns[0].content
    assert question.endswith("trajectory for the ego car with reasons.")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("tasks", ["think_before_planning", "questions"])
def test_a_run_is_told_what_its_words_need(tmp_path, tasks, caplog):
    caplog.set_level(logging.INFO)
    talk = {"data.conversation.tasks": tasks, "data.conversation.scene_texts": True}
    config = change(load_config(str(TINY)), "words", talk)
    data = dataclasses.replace(config.data, records=str(make_records(tmp_path / "records")))
    with pytest.raises(ConfigError, match="conversation does not fit"):
        check_lengths(training_samples(data, config.model, 2))
    roomy = dataclasses.replace(data, sequence_length=512, max_targets=400, max_coordinates=20)
    check_lengths(training_samples(roomy, config.model, 2))
    # Of questions: a coordinate that is asked about is told only with position input.
    assert ("all look alike" in caplog.text) == (tasks == "questions")
    caplog.clear()
    training_samples(roomy, dataclasses.replace(config.model, position_input=True), 2)
    assert "all look alike" not in caplog.text


def test_what_does_not_go_together_is_said(record, tmp_path):
    thinks = {"data.conversation.tasks": "think_before_planning", "model.decoder.whole_trajectory": True}
    config = change(load_config(str(TINY)), "think", thinks)
    with pytest.raises(ConfigError, match="whole_trajectory False"):
        SampleBuilder(config.data, config.model)
    asks = ConversationConfig(tasks="questions")
    data = dataclasses.replace(
        load_config(str(TINY)).data, records=str(make_records(tmp_path / "records")), conversation=asks
    )
    with pytest.raises(ConfigError, match="scene_texts True"):
        training_samples(data, config.model, 2)

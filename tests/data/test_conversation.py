import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from spacedrive_jax.batch import TokenType
from spacedrive_jax.config import load_config
from spacedrive_jax.data.conversation import ConversationConfig, training_conversation
from spacedrive_jax.data.language_data import DESCRIPTION_QUESTIONS, LanguageData, pseudo_coordinate_questions
from spacedrive_jax.data.prompts import parse_coordinates
from spacedrive_jax.data.tokenizer import COORDINATE
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import DataError, SpaceDriveError
from tests.conftest import ROOT
from tests.record_factory import encode_png, make_record

CONFIG = load_config(str(ROOT / "tests" / "tiny_config.py"))
VQA = [
    {"question": "What matters?", "answer": "A car at (+5.00, -2.00), velocity: (+1.00, 0.0)."},
    {"question": "What next?", "answer": "Keep lane."},
    {
        "question": "If you follow [(+1.00, +2.00)], what would happen?",
        "answer": "Crash at (+3.00, +4.00).",
    },
    {"question": "If you follow [(+9.00, +2.00)], what would happen?", "answer": "Safe."},
]


@pytest.fixture
def record():
    depth = [encode_png(np.full((45, 80), 12.5 * 256, np.uint16))] * 6
    return make_record(np.random.default_rng(3), exact_depth=depth)


@pytest.fixture
def language_data(tmp_path, record):
    def write(kind, content):
        path = tmp_path / kind / "train" / f"{record['token']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    write("vqa", VQA)
    write("conv", [{"question": "Is it wet at (2.0, 3.0)?", "answer": "No."}])
    write("desc", {"description": "A sunny road."})
    write("keywords", "go straight")
    return tmp_path


def talk_about(record, tokens=6, **options):
    return training_conversation(
        record, ConversationConfig(**options), "navigation", coordinate_tokens=tokens
    )


def without_future(record):
    return {**record, "waypoint_mask": np.array([True] * 5 + [False])}


def test_planning_comes_first_then_every_question(record, language_data):
    talk = talk_about(record, tasks="planning_and_questions", language_data=str(language_data))
    assert [turn.role for turn in talk.turns] == ["user", "assistant"] * 8
    assert "planning trajectory" in talk.turns[1].content
    answers = {turn.content for turn in talk.turns[3::2]}
    assert {"go straight", "A sunny road.", "No.", "Safe."} <= answers
    assert f"A car at {COORDINATE}, velocity: (+1.00, 0.0)." in answers
    asked = {turn.content for turn in talk.turns[2::2]}
    assert "Please shortly describe your driving action." in asked
    assert asked & set(DESCRIPTION_QUESTIONS)
    assert sum("<image>" in turn.content for turn in talk.turns) == 1
    count = sum(turn.content.count(COORDINATE) for turn in talk.turns)
    assert len(talk.coordinates) == count == 6 + 5
    np.testing.assert_array_equal(talk.coordinates[:6], record["waypoints"].astype(np.float32))
    # The same every time, another order for another keyframe.
    again = talk_about(record, tasks="planning_and_questions", language_data=str(language_data))
    assert again.turns == talk.turns


def test_coordinates_follow_their_tokens(record, language_data):
    talk = talk_about(record, tasks="planning_and_questions", language_data=str(language_data))
    known = {"A car at": (5, -2), "Is it wet": (2, 3), "Crash": (3, 4)}
    points = iter(talk.coordinates[6:])
    for turn in talk.turns[2:]:
        for _ in range(turn.content.count(COORDINATE)):
            point = next(points)
            for words, expected in known.items():
                if words in turn.content:
                    np.testing.assert_array_equal(point, expected)


def test_counterfactual_questions_alone(record, language_data):
    talk = talk_about(record, tasks="counterfactual", language_data=str(language_data))
    assert len(talk.turns) == 4
    assert talk.turns[0].content.count("<image>") == 6
    assert {turn.content for turn in talk.turns[1::2]} == {"Crash at (+3.00, +4.00).", "Safe."}
    assert sorted(talk.coordinates[:, 0]) == [1, 9]


def test_nothing_is_asked_without_a_future(record, language_data):
    lonely = talk_about(without_future(record))
    assert [turn.role for turn in lonely.turns] == ["user"]
    assert "trajectory" not in lonely.turns[0].content
    asked = talk_about(
        without_future(record), tasks="planning_and_questions", language_data=str(language_data)
    )
    assert len(asked.turns) == 14
    assert asked.turns[0].content.startswith("<image>")


def test_absent_files_are_no_questions(record, tmp_path):
    talk = talk_about(record, tasks="planning_and_questions", language_data=str(tmp_path))
    assert len(talk.turns) == 2


def test_answer_styles(record):
    digits = talk_about(record, tokens=None, command_in_answer=True)
    np.testing.assert_allclose(parse_coordinates(digits.turns[1].content), record["waypoints"], atol=0.0101)
    assert digits.turns[1].content.startswith("The ego vehicle is")
    assert not len(digits.coordinates)
    single = talk_about(record, tokens=1)
    assert single.turns[1].content == f"Here is the planning trajectory [{COORDINATE}]"


def test_damaged_language_data_is_named(record, language_data):
    path = language_data / "vqa" / "train" / f"{record['token']}.json"
    for content, message in (
        ("{", "not JSON"),
        ('{"question": 1}', "must hold a list"),
        ('[{"question": "a"}]', "lacks the field `answer`"),
        ('[{"question": "a", "answer": 3}]', "`answer` must be a text"),
    ):
        path.write_text(content)
        with pytest.raises(SpaceDriveError, match=message):
            talk_about(record, tasks="planning_and_questions", language_data=str(language_data))


def test_counterfactual_test_is_read_without_executing(tmp_path):
    folder = tmp_path / "eval_cf"
    folder.mkdir()
    data = LanguageData(tmp_path)
    assert data.counterfactual_test("none") == []
    (folder / "a.pkl").write_bytes(pickle.dumps([{"traj": "PT, [(1.0, 2.0)]", "status": ["safe"]}]))
    assert data.counterfactual_test("a")[0].risks == ("safe",)

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (folder / "b.pkl").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(SpaceDriveError, match="only plain values"):
        data.counterfactual_test("b")
    assert not (tmp_path / "executed").exists()
    (folder / "c.pkl").write_bytes(b"\x80\x04junk")
    with pytest.raises(SpaceDriveError, match="not a pickle"):
        data.counterfactual_test("c")
    (folder / "d.pkl").write_bytes(pickle.dumps([{"traj": "x"}]))
    with pytest.raises(SpaceDriveError, match="every item needs"):
        data.counterfactual_test("d")


def test_pseudo_tasks_add_up():
    questions = pseudo_coordinate_questions(np.random.default_rng(1))
    assert len(questions) == 4
    start, end, moved = parse_coordinates(questions[0].question + questions[0].answer)
    np.testing.assert_allclose(end - start, moved, atol=0.02)
    start, moved, end = parse_coordinates(questions[2].question + questions[2].answer)
    np.testing.assert_allclose(end - start, moved, atol=0.02)
    assert "in x direction" in questions[1].answer
    assert "in x direction" in questions[3].question


def test_sample_with_questions(record, language_data):
    conversation = ConversationConfig(
        tasks="planning_and_questions", language_data=str(language_data), pseudo_coordinates=True
    )
    data = dataclasses.replace(
        CONFIG.data, conversation=conversation, sequence_length=1500, max_targets=800, max_coordinates=24
    )
    builder = SampleBuilder(data, CONFIG.model)
    sample = builder(record, 0)
    used = int((sample.token_type_ids == TokenType.COORDINATE).sum())
    assert used == np.flatnonzero(sample.coordinates.any(axis=1)).max() + 1 > 11
    assert sample.waypoint_mask.all()
    assert (sample.waypoint_indices < np.flatnonzero(sample.token_type_ids == TokenType.COORDINATE)[6]).all()
    # Questions alone have coordinates in their answers, but no waypoints.
    alone = builder(without_future(record), 0)
    assert not alone.waypoint_mask.any()
    assert alone.target_mask.any()
    short = dataclasses.replace(data, max_coordinates=8)
    with pytest.raises(SpaceDriveError, match=r"data\.max_coordinates 8"):
        SampleBuilder(short, CONFIG.model)(record, 0)


def test_language_data_in_the_wrong_place_is_refused(tmp_path):
    (tmp_path / "outer/vqa/train").mkdir(parents=True)
    (tmp_path / "outer/vqa/train/a.json").write_text("[]")
    assert LanguageData(tmp_path / "outer").tokens(["vqa"]) == {"a"}
    for root, hint in ((tmp_path, "is .*outer meant"), (tmp_path / "no", "no question")):
        with pytest.raises(DataError, match=hint):
            LanguageData(root).tokens(["vqa"])


def test_language_data_is_not_read_outside_its_folder(tmp_path):
    with pytest.raises(DataError, match="does not stay inside"):
        LanguageData(tmp_path).counterfactual_questions("../../etc/passwd")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It is wet.<|im_end|>", r"the assistant's text .* spells <\|im_end\|> out"),
        ("<|vision_start|>", "spells <.vision_start.> out"),
        ("See <image>", "spells an image's token out"),
        ("<|image_pad|>", "spells an image's token out"),
        ("At <POS_INDICATOR><POS_EMBEDDING>", "spells <POS_INDICATOR> or <POS_EMBEDDING> out"),
        ("At <POS_EMBEDDING>", "spells <POS_INDICATOR> or <POS_EMBEDDING> out"),
        (f"At ({'9' * 60}, 1.0)", "a coordinate that no number can hold"),
    ],
)
def test_texts_that_a_tokenizer_would_take_for_something_else_are_refused(record, language_data, text, said):
    (language_data / "keywords/train" / f"{record['token']}.json").write_text(json.dumps(text))
    talk = ConversationConfig(tasks="planning_and_questions", language_data=str(language_data))
    data = dataclasses.replace(
        CONFIG.data, conversation=talk, sequence_length=1500, max_targets=800, max_coordinates=24
    )
    with pytest.raises(DataError, match=f"keyframe {record['token']}: .*{said}"):
        SampleBuilder(data, CONFIG.model)(record, 0)

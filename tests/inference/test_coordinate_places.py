"""Which of an answer's coordinates count, and how they are printed, by the published rule."""

import numpy as np
import pytest

from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.inference.answers import answer_text
from spacedrive_jax.inference.progress import coordinate_indices

WORD, INDICATOR, END = 1, 2, 3


def indices(ids, room=3):
    padded = np.array([ids + [INDICATOR] * room])  # what stands behind the answer must not matter
    return np.flatnonzero(coordinate_indices(padded, np.array([len(ids)]), INDICATOR)[0]).tolist()


def run(length):
    return [INDICATOR] * length


@pytest.mark.parametrize("length", [2, 3, 4, 20, 21])
def test_a_run_has_one_coordinate(length):
    assert indices([WORD, *run(length), WORD, END]) == [2]
    assert indices([*run(length), WORD, END]) == [1]
    assert indices([WORD, *run(length)]) == [2]
    assert indices([WORD, *run(length), WORD, *run(length), END]) == [2, length + 3]


def test_an_indicator_at_the_end_has_no_coordinate():
    assert indices([INDICATOR]) == []
    assert indices([WORD, INDICATOR]) == []
    assert indices([WORD, INDICATOR, WORD, INDICATOR]) == [2]
    assert indices([WORD, END]) == []


def test_the_roll_goes_round():
    # As published: an answer that begins and ends with an indicator loses its first coordinate.
    assert indices(run(2)) == []
    assert indices(run(20)) == []
    assert indices([INDICATOR, WORD, WORD, INDICATOR]) == []
    assert indices([INDICATOR, WORD, INDICATOR, WORD, INDICATOR, INDICATOR]) == [3, 5]
    assert indices([INDICATOR, WORD]) == [1]


def test_equals_the_published_masks_on_random_answers():
    rng = np.random.default_rng(0)
    answers = rng.choice([WORD, INDICATOR], (3000, 12), p=[0.4, 0.6])
    lengths = rng.integers(1, 13, 3000)
    ours = np.asarray(coordinate_indices(answers, lengths, INDICATOR))
    for ids, length, got in zip(answers, lengths, ours, strict=True):
        mask = ids[:length] == INDICATOR
        if mask.sum() > 1:
            mask = mask & ~np.roll(mask, 1)
        behind = np.roll(mask, 1)
        behind[0] = False
        np.testing.assert_array_equal(got[:length], behind)
        assert not got[length:].any()


def published_text(tokenizer, ids, points, decoded):
    """Position tokens where coordinates count, then one coordinate after the other over the first left."""
    text = tokenizer.decode(np.where(decoded, tokenizer.position, ids).tolist())
    for x, y in points[decoded][:, :2].tolist():
        text = text.replace("<POS_EMBEDDING>", f"({x:.2f}, {y:.2f})", 1)
    return text


def test_text_of_runs_and_stray_position_tokens():
    tokenizer = load_tokenizer()
    indicator, position = tokenizer.indicator, tokenizer.position
    word, comma = tokenizer.encode("Here")[0], tokenizer.encode(", ")
    run_of_four = [word, *[indicator] * 4, *comma, indicator, word, tokenizer.turn_end]
    stray = [position, indicator, word, *comma, indicator, position, position, word]
    trailing = [word, indicator, indicator]
    for ids in (run_of_four, stray, trailing, [position], [indicator]):
        ids = np.array(ids)
        decoded = np.asarray(coordinate_indices(ids[None], np.array([len(ids)]), indicator))[0]
        points = np.where(decoded[:, None], np.arange(3.0 * len(ids)).reshape(-1, 3) - 4.125, 0)
        text = answer_text(tokenizer, ids, points, decoded)
        assert text == published_text(tokenizer, ids, points, decoded)
    ids = np.array(run_of_four)
    decoded = np.isin(np.arange(len(ids)), [2, len(ids) - 2])
    text = answer_text(tokenizer, ids, np.tile([1.005, -0.004, 9], (len(ids), 1)), decoded)
    indicators = "<POS_INDICATOR>" * 2
    assert text == f"Here<POS_INDICATOR>(1.00, -0.00){indicators}, <POS_INDICATOR>(1.00, -0.00)<|im_end|>"


def test_text_of_a_whole_trajectory():
    tokenizer = load_tokenizer()
    ids = np.array([tokenizer.encode("Here")[0], tokenizer.indicator, 5, tokenizer.turn_end])
    decoded = np.array([False, False, True, False])
    trajectory = np.array([[1.0, 0.5, 0], [2.0, 1.0, 0]])
    text = answer_text(tokenizer, ids, np.zeros((4, 3)), decoded, trajectory)
    assert text == "Here<POS_INDICATOR>(1.00, 0.50)<POS_INDICATOR>(2.00, 1.00)<|im_end|>"
    assert answer_text(tokenizer, ids, np.zeros((4, 3)), decoded & False, trajectory) == tokenizer.decode(
        ids.tolist()
    )

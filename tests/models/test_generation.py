from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.errors import SpaceDriveError

GRID = (4, 6)
IMAGE = 90


@pytest.fixture(scope="module")
def prompts():
    generator = np.random.default_rng(0)
    token_ids = generator.integers(0, 80, (2, 14)).astype(np.int32)
    token_ids[:, 2:8] = IMAGE
    lengths = np.array([14, 11])
    images = generator.standard_normal((2, 1, 24, 96)).astype(np.float32)
    return token_ids, lengths, images


@pytest.fixture(scope="module")
def generated(tiny_model, prompts):
    token_ids, lengths, images = prompts
    return tiny_model.generate(
        token_ids,
        pixel_values=jnp.asarray(images),
        image_grid_thw=(1, *GRID),
        lengths=lengths,
        max_new_tokens=6,
    )


def test_greedy_ids_equal_those_without_a_cache(tiny_model, prompts, generated):
    token_ids, lengths, images = prompts
    assert generated.shape == (2, 6)
    for row, length in enumerate(lengths):
        sequence = np.concatenate([token_ids[row, :length], generated[row]])[None]
        logits = tiny_model.logits(
            sequence, pixel_values=jnp.asarray(images[row : row + 1]), image_grid_thw=(1, *GRID)
        )
        expected = np.argmax(logits[0, length - 1 : -1], axis=-1)
        np.testing.assert_array_equal(generated[row], expected)


def test_a_stopped_sample_is_padded_and_the_other_goes_on(tiny_model, prompts, generated):
    token_ids, lengths, images = prompts
    stop = next(int(each) for each in generated[0] if each not in generated[1])
    at = generated[0].tolist().index(stop)
    stopped = tiny_model.generate(
        token_ids,
        pixel_values=jnp.asarray(images),
        image_grid_thw=(1, *GRID),
        lengths=lengths,
        max_new_tokens=6,
        stop_ids=(stop,),
        pad_id=95,
    )
    np.testing.assert_array_equal(stopped[0], [*generated[0, : at + 1], *[95] * (5 - at)])
    np.testing.assert_array_equal(stopped[1], generated[1])


def test_images_matter(tiny_model, prompts, generated):
    token_ids, lengths, images = prompts
    arguments = {"image_grid_thw": (1, *GRID), "lengths": lengths}
    ours = tiny_model.logits(token_ids, pixel_values=jnp.asarray(images), **arguments)
    other = tiny_model.logits(token_ids, pixel_values=jnp.asarray(images[::-1].copy()), **arguments)
    assert np.abs(ours - other)[0, 13].max() > 1e-6
    np.testing.assert_array_equal(ours[:, :2], other[:, :2])


@pytest.mark.usefixtures("unchecked")
def test_bad_requests_are_refused(tiny_model, prompts):
    token_ids, _, images = prompts
    with pytest.raises(SpaceDriveError, match="max_new_tokens"):
        tiny_model.generate(token_ids[:, 8:], max_new_tokens=0)
    with pytest.raises(SpaceDriveError, match="prompt lengths"):
        tiny_model.generate(token_ids[:, 8:], max_new_tokens=1, lengths=np.array([6, 0]))
    with pytest.raises(SpaceDriveError, match="runs of"):
        tiny_model.generate(token_ids, max_new_tokens=1)
    with pytest.raises(SpaceDriveError, match="image_grid_thw"):
        tiny_model.generate(token_ids[:, 8:], max_new_tokens=1, pixel_values=jnp.asarray(images[:, :0]))
    left = np.concatenate([np.zeros((2, 3), np.int64), token_ids[:, 8:]], axis=1)
    for wrong, said in (
        ({"token_ids": left, "lengths": np.array([6, 6])}, "read right-padded"),
        ({"token_ids": left, "lengths": [6.0, 5.5]}, r"lengths \[6\.0, 5\.5\] must be 2 whole numbers"),
        ({"token_ids": left, "lengths": np.ones((2, 9))}, r"lengths of shape \(2, 9\) \(attention_mask"),
        ({"token_ids": [[1, 2], [3]]}, "token_ids are no one array"),
        ({"token_ids": left, "pad_id": None}, "pad_id holds None"),
        ({"token_ids": left, "stop_ids": "</s>"}, "stop_ids holds '<'"),
        ({"token_ids": left, "max_new_tokens": 2.5}, "max_new_tokens holds 2.5"),
    ):
        with pytest.raises(SpaceDriveError, match=said):
            tiny_model.generate(**{"max_new_tokens": 1} | wrong)


class Tensor:
    """As torch's: no array, but one can be made of it."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values

    def size(self):
        """A method there."""


@pytest.mark.usefixtures("unchecked")
def test_tensors_of_others_and_one_stop_id_are_taken(tiny_model, prompts, generated):
    token_ids, lengths, images = prompts
    given = {"pixel_values": Tensor(images), "image_grid_thw": Tensor(np.array([[1, *GRID]] * 2))}
    found = tiny_model.generate(
        Tensor(token_ids), **given, lengths=Tensor(lengths), max_new_tokens=np.int64(6), stop_ids=0
    )
    np.testing.assert_array_equal(found[:, 0], generated[:, 0])

"""The numbers of transformers 4.52 and peft 0.14 on a tiny SpaceDrive+ (tests/golden/qwen_plus_train)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spacedrive_jax.models.positions import find_image_spans, mrope_positions
from tests.golden.verify.modules import hidden_states

TOLERANCE = 2e-5


def worst(actual, expected):
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    return np.abs(actual - expected).max()


def test_vision_tower_gives_the_visual_tokens(golden_arrays, golden_model):
    features = golden_model.encode_images(jnp.asarray(golden_arrays["pixel_values"]), (6, 10))
    assert worst(features, golden_arrays["image_embeds"]) < TOLERANCE


def test_decoder_with_adapters_gives_hidden_states_and_logits(golden_arrays, golden_model):
    embeddings, position_ids = (
        jnp.asarray(golden_arrays["inputs_embeds"]),
        jnp.asarray(golden_arrays["position_ids"]),
    )
    hidden = hidden_states(golden_model.decoder, embeddings, position_ids)[:, :, golden_arrays["places"]]
    for layer in range(4):
        assert worst(hidden[layer], golden_arrays[f"hidden_states_{layer}"]) < TOLERANCE
    final, _ = golden_model.decoder(embeddings, position_ids)
    logits = golden_model.decoder.logits(final[:, golden_arrays["places"]])
    assert worst(logits, golden_arrays["logits"]) < TOLERANCE


def test_golden_adapters_take_part(golden_arrays, golden_model):
    """Guards the test above against adapters that do nothing."""
    graph, state = nnx.split(golden_model)
    flat = dict(nnx.to_flat_state(state))
    path = ("decoder", "layers", "attention", "v", "adapter", "b")
    flat[path] = flat[path].replace(jnp.zeros_like(flat[path][...]))
    without = nnx.merge(graph, nnx.from_flat_state(flat))
    embeddings, position_ids = (
        jnp.asarray(golden_arrays["inputs_embeds"]),
        jnp.asarray(golden_arrays["position_ids"]),
    )
    final, _ = without.decoder(embeddings, position_ids)
    logits = without.decoder.logits(final[:, golden_arrays["places"]])
    assert worst(logits, golden_arrays["logits"]) > 100 * TOLERANCE


def test_text_embeddings_are_those_of_the_table_and_the_new_rows(golden_arrays, golden_model):
    token_ids = golden_arrays["input_ids"]
    embedded = np.asarray(golden_model.embed(jnp.asarray(token_ids)))
    indicator = token_ids == 510
    text = (token_ids != 509) & (token_ids < 510)
    assert indicator.any()
    for chosen in (text, indicator):
        np.testing.assert_array_equal(embedded[chosen], golden_arrays["inputs_embeds"][chosen])


def test_positions_count_ego_slots_as_text(golden_arrays):
    token_ids, grid = golden_arrays["input_ids"][0], (3, 5)
    images_end = np.flatnonzero(token_ids == 508)[5]
    spans = find_image_spans(token_ids[:images_end], [grid] * 6, 509)
    position_ids, rope_delta = mrope_positions(len(token_ids), spans)
    np.testing.assert_array_equal(position_ids, golden_arrays["position_ids"][:, 0])
    assert rope_delta == position_ids.max() + 1 - len(token_ids)

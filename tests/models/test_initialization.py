from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.interop.hf_checkpoint import TRAINABLE
from spacedrive_jax.models.config import ComputeConfig, LoraConfig, NewTokensConfig
from spacedrive_jax.models.language_model import LanguageModel
from spacedrive_jax.models.partitioning import draw_parameters, initialize

from .conftest import tiny_config

CONFIG = tiny_config().decoder


def build(rngs: nnx.Rngs) -> LanguageModel:
    return LanguageModel(
        CONFIG,
        compute=ComputeConfig(),
        rngs=rngs,
        lora=LoraConfig(rank=2),
        new_tokens=NewTokensConfig(80),
    )


@pytest.fixture(scope="module")
def decoder() -> LanguageModel:
    return initialize(build, seed=0)


def test_layers_start_from_different_weights(decoder):
    kernel = np.asarray(decoder.layers.mlp.gate.kernel[...])
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01
    assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert kernel.mean() == pytest.approx(0.0, abs=0.002)
    np.testing.assert_array_equal(decoder.layers.attention_norm.scale[...], 1.0)
    np.testing.assert_array_equal(decoder.layers.attention.q.bias[...], 0.0)
    np.testing.assert_array_equal(decoder.layers.attention.q.adapter.b[...], 0.0)


def test_weights_drawn_by_their_inputs_keep_signals_their_size():
    drawn = initialize(
        lambda rngs: LanguageModel(CONFIG, compute=ComputeConfig(init="fan_in"), rngs=rngs), seed=0
    )
    layer, width = drawn.layers, CONFIG.hidden_size
    for kernel, inputs in (
        (layer.mlp.gate.kernel, width),
        (layer.mlp.down.kernel, CONFIG.intermediate_size),
        (layer.attention.o.kernel, CONFIG.num_heads * CONFIG.head_dim),
        (drawn.embedding, width),
    ):
        assert np.asarray(kernel[...]).std() == pytest.approx(inputs**-0.5, rel=0.1)


def test_a_part_is_drawn_as_in_the_whole_and_where_it_is_asked_to_be(decoder):
    mesh = jax.make_mesh((1,), ("model",))

    def shardings(names, shape):
        assert len(names) == len(shape)
        axes = ("model" if name == "embed" else None for name in names)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    part = draw_parameters(build, seed=0, wanted=TRAINABLE, shardings=shardings)
    whole = dict(nnx.to_flat_state(nnx.state(decoder)))
    drawn = nnx.to_flat_state(part)
    assert len(drawn) == 10
    for path, variable in drawn:
        np.testing.assert_array_equal(variable[...], whole[path][...])
    a = dict(drawn)[("layers", "attention", "q", "adapter", "a")]
    assert a[...].sharding.spec == jax.sharding.PartitionSpec(None, "model", None)


def test_seeds_differ(decoder):
    other = draw_parameters(build, seed=1, wanted=nnx.LoRAParam)
    theirs = nnx.state(decoder, nnx.LoRAParam)
    key = ("layers", "attention", "q", "adapter", "a")
    difference = dict(nnx.to_flat_state(other))[key][...] - dict(nnx.to_flat_state(theirs))[key][...]
    assert np.abs(difference).max() > 0.01


def test_every_dropout_has_a_key_of_its_own():
    """`fold_in(key, n)` is the n-th key of `split(key, …)`: the two do not go together."""
    drawn = SimpleNamespace(config=SimpleNamespace(num_layers=3), lora=SimpleNamespace(targets=("q", "up")))
    step = jax.random.key(0)
    attention, mlp = LanguageModel._dropout_keys(drawn, step)
    keys = [*attention.reshape(-1), *mlp.reshape(-1), step]
    keys += [jax.random.fold_in(step, number) for number in range(2, 16)]  # what else may come of the step
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.interop.hf_checkpoint import TRAINABLE
from spacedrive_jax.models.config import ComputeConfig, LoraConfig, NewTokensConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVL
from spacedrive_jax.models.language_model import LanguageModel, NewTokenParam
from spacedrive_jax.models.layers import LowRankAdapter
from tests.golden.verify.modules import hidden_states

from .conftest import random_module, tiny_config

CONFIG = tiny_config().decoder
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.5)
COMPUTE = ComputeConfig()


def build(compute=COMPUTE, lora=None, new_tokens=None, config=CONFIG, seed=0) -> LanguageModel:
    def construct():
        return LanguageModel(config, compute=compute, rngs=nnx.Rngs(0), lora=lora, new_tokens=new_tokens)

    return random_module(construct, seed)


@pytest.fixture(scope="module")
def decoder() -> LanguageModel:
    return build()


@pytest.fixture(scope="module")
def adapted() -> LanguageModel:
    return build(lora=LORA, new_tokens=NewTokensConfig(first_id=80, count=2))


def inputs(batch=2, length=9, seed=0):
    generator = np.random.default_rng(seed)
    token_ids = jnp.asarray(generator.integers(0, 80, (batch, length)), jnp.int32)
    position_ids = jnp.asarray(generator.integers(0, 12, (3, batch, length)), jnp.int32)
    return token_ids, position_ids


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, token_ids, position_ids, options):
    model = nnx.merge(graph, state)
    return model(model.embed(token_ids), position_ids, **options)


def run(model: LanguageModel, token_ids, position_ids, **options):
    return _run(*nnx.split(model), token_ids, position_ids, options)


@functools.partial(jax.jit, static_argnames=("graph", "room"))
def _prefill(graph, state, token_ids, position_ids, lengths, room):
    model = nnx.merge(graph, state)
    return model.prefill(model.embed(token_ids), position_ids, lengths=lengths, room=room)


def prefill(model: LanguageModel, token_ids, position_ids, *, lengths=None, room):
    return _prefill(*nnx.split(model), token_ids, position_ids, lengths, room)


def test_later_tokens_and_padding_change_nothing(decoder):
    token_ids, position_ids = inputs()
    reference, cache = run(decoder, token_ids, position_ids)
    assert cache is None
    changed = token_ids.at[:, 6:].set(3)
    later, _ = run(decoder, changed, position_ids)
    np.testing.assert_array_equal(later[:, :6], reference[:, :6])
    assert np.abs(later[:, 6:] - reference[:, 6:]).max() > 1e-3
    padded, _ = run(decoder, changed, position_ids, lengths=jnp.array([6, 4]))
    np.testing.assert_allclose(padded[0, :6], reference[0, :6], atol=1e-6)
    np.testing.assert_allclose(padded[1, :4], reference[1, :4], atol=1e-6)
    assert np.isfinite(padded).all()


def test_every_position_axis_turns_its_own_frequencies(decoder):
    token_ids, position_ids = inputs()
    reference, _ = run(decoder, token_ids, position_ids)
    for axis in range(3):
        moved, _ = run(decoder, token_ids, position_ids.at[axis, :, 4].add(5))
        assert np.abs(moved[:, 4:] - reference[:, 4:]).max() > 1e-5
        np.testing.assert_array_equal(moved[:, :4], reference[:, :4])


def test_cached_steps_equal_the_whole_sequence_at_unequal_lengths(adapted):
    token_ids, position_ids = inputs(length=12)
    lengths = np.array([7, 4])
    whole, _ = run(adapted, token_ids, position_ids)
    first, cache = prefill(
        adapted, token_ids[:, :8], position_ids[:, :, :8], lengths=jnp.asarray(lengths), room=4
    )
    assert cache.capacity == 12
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(first[row, :length], whole[row, :length], atol=2e-6)
    rows = np.arange(2)
    for _ in range(4):
        at = np.asarray(cache.lengths)
        new_ids, new_positions = token_ids[rows, at][:, None], position_ids[:, rows, at][..., None]
        hidden, cache = run(adapted, new_ids, new_positions, cache=cache)
        np.testing.assert_allclose(hidden[:, 0], whole[rows, at], atol=2e-6)
    np.testing.assert_array_equal(cache.lengths, lengths + 4)


def test_several_tokens_can_be_added_to_a_cache_at_once(decoder):
    token_ids, position_ids = inputs(length=10)
    whole, _ = run(decoder, token_ids, position_ids)
    hidden, cache = prefill(decoder, token_ids[:, :3], position_ids[:, :, :3], room=8)
    np.testing.assert_allclose(hidden, whole[:, :3], atol=2e-6)
    for start, stop in ((3, 8), (8, 10)):
        hidden, cache = run(decoder, token_ids[:, start:stop], position_ids[:, :, start:stop], cache=cache)
        np.testing.assert_allclose(hidden, whole[:, start:stop], atol=2e-6)


def test_hidden_states_begin_with_the_input_and_end_with_the_output(decoder):
    token_ids, position_ids = inputs()
    layers = hidden_states(decoder, decoder.embed(token_ids), position_ids)
    assert layers.shape == (CONFIG.num_layers + 1, 2, 9, CONFIG.hidden_size)
    np.testing.assert_array_equal(layers[0], decoder.embed(token_ids))
    np.testing.assert_allclose(layers[-1], run(decoder, token_ids, position_ids)[0], atol=1e-6)


def test_new_tokens_have_rows_of_their_own(adapted):
    plain = build(lora=LORA)
    token_ids = jnp.array([[79, 80, 81, 82]])
    embedded = adapted.embed(token_ids)[0]
    np.testing.assert_array_equal(embedded[1:3], adapted.new_embedding[...])
    np.testing.assert_array_equal(embedded[0], adapted.embedding[...][79])
    np.testing.assert_array_equal(embedded[3], adapted.embedding[...][82])
    hidden = jax.random.normal(jax.random.key(1), (2, 5, CONFIG.hidden_size))
    logits = np.asarray(adapted.logits(hidden))
    np.testing.assert_allclose(logits[..., 80:82], hidden @ adapted.new_head[...].T, atol=1e-6)
    ours = np.delete(logits, [80, 81], axis=-1)
    np.testing.assert_array_equal(ours, np.delete(np.asarray(plain.logits(hidden)), [80, 81], axis=-1))


def test_new_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(SpaceDriveError, match=r"95\.\.96.*vocabulary of 96"):
        build(new_tokens=NewTokensConfig(first_id=95, count=2))


def test_tied_head_is_the_embedding():
    tied = build(config=dataclasses.replace(CONFIG, tie_word_embeddings=True))
    hidden = jnp.eye(CONFIG.hidden_size)
    np.testing.assert_allclose(tied.logits(hidden), tied.embedding[...].T, atol=1e-6)
    assert ("head",) not in dict(nnx.to_flat_state(nnx.state(tied)))


def test_fresh_adapters_change_nothing_until_trained(adapted):
    token_ids, position_ids = inputs()
    shape = (2, CONFIG.hidden_size), nnx.Rngs(1)
    fresh = LowRankAdapter(shape[0][1:], (5,), ("embed",), ("mlp",), lora=LORA, rngs=shape[1])
    x = jax.random.normal(jax.random.key(0), shape[0])
    np.testing.assert_array_equal(fresh(x, jax.random.key(2)), np.zeros((2, 5)))
    assert np.abs(fresh.a[...]).max() <= CONFIG.hidden_size**-0.5

    silent = nnx.clone(adapted)
    nnx.update(silent, jax.tree.map(jnp.zeros_like, nnx.state(adapted, nnx.LoRAParam)))
    plain = build()
    nnx.update(plain, nnx.state(adapted, nnx.Not(TRAINABLE)))
    for key in (None, jax.random.key(0)):
        hidden, _ = run(silent, token_ids, position_ids, dropout_key=key)
        np.testing.assert_array_equal(hidden, run(plain, token_ids, position_ids)[0])


def test_adapters_equal_folded_weights(adapted):
    """W + scaling * A B in place of the adapter gives the same model."""
    token_ids, position_ids = inputs()
    folded = build()
    merged = dict(nnx.to_flat_state(nnx.state(folded)))
    source = dict(nnx.to_flat_state(nnx.state(adapted)))
    for path, variable in merged.items():
        merged[path] = source[path]
        adapter = (*path[:-1], "adapter")
        if path[-1] == "kernel" and (*adapter, "a") in source:
            a, b = source[(*adapter, "a")][...], source[(*adapter, "b")][...]
            change = jnp.einsum("l...r,lrz->l...z", a, b.reshape(*b.shape[:2], -1))
            merged[path] = variable.replace(source[path][...] + LORA.scaling * change.reshape(variable.shape))
    nnx.update(folded, nnx.from_flat_state(merged))
    expected, _ = run(folded, token_ids, position_ids)
    hidden, _ = run(adapted, token_ids, position_ids)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    silent = nnx.clone(adapted)
    nnx.update(silent, jax.tree.map(jnp.zeros_like, nnx.state(adapted, nnx.LoRAParam)))
    assert np.abs(hidden - run(silent, token_ids, position_ids)[0]).max() > 0.01


def test_dropout_follows_its_key(adapted):
    token_ids, position_ids = inputs()
    first, again = (run(adapted, token_ids, position_ids, dropout_key=jax.random.key(3))[0] for _ in range(2))
    other = run(adapted, token_ids, position_ids, dropout_key=jax.random.key(4))[0]
    evaluation = run(adapted, token_ids, position_ids)[0]
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - evaluation).max() > 1e-3


def trainable_gradient(model: LanguageModel, frozen, trainable):
    token_ids, position_ids = inputs()
    graph, _ = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(trainable):
        whole = nnx.merge(graph, trainable, frozen)
        hidden, _ = whole(whole.embed(token_ids), position_ids, dropout_key=jax.random.key(0))
        return jnp.square(whole.logits(hidden)).mean()

    return gradient(trainable)


def test_remat_changes_no_gradient(adapted):
    _, trainable, frozen = nnx.split(adapted, TRAINABLE, ...)
    expected = trainable_gradient(adapted, frozen, trainable)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected["layers"]))
    for remat in ("full", "attention", "attention_mlp", "dots_no_batch"):
        model = build(compute=ComputeConfig(remat=remat), lora=LORA, new_tokens=adapted.new_tokens)
        actual = trainable_gradient(model, frozen, trainable)
        for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_training_the_adapters_makes_no_copy_of_the_frozen_stack():
    config = dataclasses.replace(CONFIG, num_layers=12, hidden_size=64, intermediate_size=512)

    def construct():
        return LanguageModel(config, compute=ComputeConfig(remat="full"), rngs=nnx.Rngs(0), lora=LORA)

    graph, trainable, frozen = nnx.split(nnx.eval_shape(construct), TRAINABLE, ...)

    def loss(trainable, frozen, token_ids, position_ids):
        model = nnx.merge(graph, trainable, frozen)
        hidden, _ = model(model.embed(token_ids), position_ids, dropout_key=jax.random.key(0))
        return jnp.square(hidden).mean()

    compiled = jax.jit(jax.grad(loss)).lower(trainable, frozen, *inputs(length=4)).compile()
    memory = compiled.memory_analysis()
    frozen_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen["layers"]))
    assert frozen_bytes > 5_000_000
    assert memory.temp_size_in_bytes < frozen_bytes / 3
    assert memory.output_size_in_bytes < frozen_bytes / 10


def test_remat_attention_keeps_what_a_frozen_base_needs_and_no_more():
    """The stacked residuals of the scan: the named five, not the wide gate and up products."""
    config = dataclasses.replace(CONFIG, intermediate_size=640)

    def kept(remat):
        def construct():
            return LanguageModel(config, compute=ComputeConfig(remat=remat), rngs=nnx.Rngs(0), lora=LORA)

        graph, trainable, frozen = nnx.split(nnx.eval_shape(construct), TRAINABLE, ...)

        def loss(trainable, frozen, token_ids, position_ids):
            model = nnx.merge(graph, trainable, frozen)
            return jnp.square(model(model.embed(token_ids), position_ids)[0]).mean()

        _, backward = jax.eval_shape(functools.partial(jax.vjp, loss), trainable, frozen, *inputs())
        sizes = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.shape[:1] == (config.num_layers,)]
        tokens = [shape for shape in sizes if len(shape) > 2 and shape[1:3] == inputs()[0].shape]
        return sorted(math.prod(shape[3:]) for shape in tokens)

    query, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width = config.hidden_size
    # The carry, the residual, queries, keys, values and what is attended to.
    assert kept("attention") == sorted([width, width, query, keys, keys, query])
    assert kept("attention_mlp") == sorted([width, width, query, keys, keys, query, 640, 640])
    assert kept("full") == [width]
    assert kept("dots_no_batch").count(640) >= 2


@pytest.mark.parametrize("remat", ["none", "full", "attention", "attention_mlp", "dots", "dots_no_batch"])
def test_remat_names_are_jax_policies(remat):
    policy = ComputeConfig(remat=remat).remat_policy()
    assert policy is None if remat == "none" else callable(policy)


def test_half_precision_keeps_trainables_and_logits_in_float32():
    compute = ComputeConfig(dtype="bfloat16", param_dtype="bfloat16")
    model = build(compute=compute, lora=LORA, new_tokens=NewTokensConfig(80))
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        trainable = isinstance(variable, nnx.LoRAParam | NewTokenParam)
        assert variable.dtype == (jnp.float32 if trainable else jnp.bfloat16)
    token_ids, position_ids = inputs()
    hidden, _ = run(model, token_ids, position_ids)
    assert hidden.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32
    wide = build(lora=LORA, new_tokens=NewTokensConfig(80))
    exact, _ = run(wide, token_ids, position_ids)
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact, atol=0.1)


def test_one_dimensional_rotary_reads_the_first_axis_only():
    model = build(config=dataclasses.replace(CONFIG, mrope_section=(4,), qkv_bias=False))
    token_ids, position_ids = inputs()
    reference, _ = run(model, token_ids, position_ids)
    np.testing.assert_array_equal(run(model, token_ids, position_ids.at[1:].add(7))[0], reference)
    assert np.abs(run(model, token_ids, position_ids.at[0, :, 5].add(7))[0] - reference).max() > 1e-5
    assert model.layers.attention.q.bias is None


def test_every_parameter_names_its_axes():
    model = nnx.eval_shape(
        lambda: QwenVL(
            tiny_config(),
            compute=COMPUTE,
            rngs=nnx.Rngs(0),
            lora=LORA,
            new_tokens=NewTokensConfig(80),
        )
    )
    specs = dict(nnx.to_flat_state(nnx.get_partition_spec(nnx.state(model))))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        names = variable.get_metadata()["out_sharding"]
        assert len(names) == len(variable.shape), path
        assert (names[0] == "layers") == ("layers" in path)
        assert tuple(specs[path].get_value()) == names
    query = model.decoder.layers.attention.q
    assert query.kernel.get_metadata()["out_sharding"] == ("layers", "embed", "heads", "head_dim")
    assert query.adapter.b.get_metadata()["out_sharding"] == ("layers", "lora", "heads", "head_dim")


def test_names_do_not_disturb_under_a_mesh():
    token_ids, position_ids = inputs()
    plain, _ = run(build(), token_ids, position_ids)
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        hidden, _ = run(build(), token_ids, position_ids)
    np.testing.assert_allclose(hidden, plain, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"mrope_section": (2, 2, 2)}, "mrope_section"),
        ({"mrope_section": (1, 1, 1, 1)}, "mrope_section"),
    ],
)
def test_impossible_decoders_are_refused(change, message):
    with pytest.raises(SpaceDriveError, match=message):
        dataclasses.replace(CONFIG, **change)

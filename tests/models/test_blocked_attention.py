import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.models.attention import BLOCK, SHORTEST_FOR_BLOCKS, attend, blocked_attention


def heads(seed, rows, length, count, channels=16):
    values = np.random.default_rng(seed).normal(size=(rows, length, count, channels))
    return jnp.asarray(values, jnp.float32)


def outcome(function, q, k, v):
    """Output and gradients of a sum with uneven weights."""
    weights = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def total(q, k, v):
        out = function(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1, 2 * BLOCK + 37])
def test_blocks_equal_plain_attention_with_grouped_heads(length):
    q, k, v = heads(0, 2, length, 4), heads(1, 2, 150, 2), heads(2, 2, 150, 2)
    plain = outcome(jax.nn.dot_product_attention, q, k, v)
    for ours, theirs in zip(outcome(blocked_attention, q, k, v), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_large_scores_do_not_overflow():
    q, k, v = (50 * heads(seed, 1, 300, 1) for seed in range(3))
    np.testing.assert_allclose(
        blocked_attention(q, k, v), jax.nn.dot_product_attention(q, k, v), rtol=1e-4, atol=1e-3
    )


def test_half_precision_keeps_scores_in_float32():
    q, k, v = (heads(seed, 1, 300, 2).astype(jnp.bfloat16) for seed in range(3))
    exact = jax.nn.dot_product_attention(*(each.astype(jnp.float32) for each in (q, k, v)))
    out = blocked_attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


def test_long_sequences_on_a_cpu_take_blocks():
    q, k, v = (heads(seed, 1, SHORTEST_FOR_BLOCKS + 5, 2) for seed in range(3))

    def loops(choice):
        return " while" in jax.jit(lambda *x: attend(*x, choice=choice)).lower(q, k, v).as_text(dialect="hlo")

    assert loops("auto")
    assert not loops("xla")
    found, expected = (attend(q, k, v, choice=choice) for choice in ("auto", "xla"))
    np.testing.assert_allclose(found, expected, atol=2e-6)

"""The fused kernel on a GPU against the plain one; skipped where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.models.attention import attend

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


@pytest.mark.parametrize(
    ("length", "causal", "lengths", "channels"),
    [
        pytest.param(300, True, (300, 170), 128, id="causal, padded samples"),
        pytest.param(256, False, None, 80, id="whole image"),
        pytest.param(151, False, None, 64, id="odd length"),
        pytest.param(64, False, (32, 64), 80, id="windows of two sizes"),
    ],
)
def test_cudnn_equals_plain(length, causal, lengths, channels):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (
        jax.random.normal(key, (2, length, heads, channels), jnp.bfloat16)
        for key, heads in zip(keys, (4, 2, 2, 4), strict=True)
    )
    counts = None if lengths is None else jnp.asarray(lengths)
    # What comes out behind a causal sample's end is never read.
    ends = jnp.asarray(lengths) if causal and lengths else jnp.full(2, length)
    weights = jnp.where((jnp.arange(length) < ends[:, None])[:, :, None, None], weights, 0)

    def loss(q, k, v, choice):
        out = attend(q, k, v, choice=choice, causal=causal, lengths=counts)
        return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    wide = [each.astype(jnp.float32) for each in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        expected, expected_gradients = gradient(*wide, "xla")
    found, gradients = gradient(q, k, v, "cudnn")
    assert abs(float(found - expected)) < 2e-2 * float(jnp.linalg.norm(weights.astype(jnp.float32)))
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float32) - np.asarray(theirs))
        assert error < 1e-2 * np.linalg.norm(np.asarray(theirs))

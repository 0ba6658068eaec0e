import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spacedrive_jax.training.losses import label_cross_entropy


@pytest.mark.parametrize("indices", [3, 4, 10])
def test_chunks_give_the_plain_cross_entropy_and_gradient(indices):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, indices, 5)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 7, (2, indices)))

    def chunked(hidden, table):
        return label_cross_entropy(lambda each: each @ table.T, hidden, ids, chunk=4)

    def plain(hidden, table):
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ table.T, ids)

    np.testing.assert_allclose(chunked(hidden, table), plain(hidden, table), rtol=1e-5)
    ours, theirs = (
        jax.grad(lambda *values, of=of: of(*values).sum(), argnums=(0, 1))(hidden, table)
        for of in (chunked, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)

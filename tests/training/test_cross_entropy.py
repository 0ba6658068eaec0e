import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spacedrive_jax.config import load_config
from spacedrive_jax.models.spacedrive import Outputs
from spacedrive_jax.training.losses import Counted, label_cross_entropy, position_loss, select
from spacedrive_jax.training.state import make_model
from spacedrive_jax.training.step import fake_batch
from tests.training.runs import TINY


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


def test_pieces_with_unequally_many_waypoints_give_the_mean_of_the_batch():
    config = load_config(str(TINY))
    batch = fake_batch(config)
    batch.waypoint_mask[:] = [[True] * 6, [False] * 6, [True] + [False] * 5, [True] * 3 + [False] * 3]
    batch = jax.tree.map(jnp.asarray, batch)
    model = nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0)))
    guess = np.random.default_rng(0).normal(0, 9, (batch.size, 6, 3)).astype(np.float32)

    def score(rows, counted):
        part = jax.tree.map(lambda leaf: leaf[rows], batch)
        coordinates = jnp.asarray(guess[rows])
        nothing = jnp.zeros((*coordinates.shape[:2], 1))
        outputs = Outputs(nothing, nothing, coordinates)
        return position_loss(model, outputs, select(model, part, config.train), config.train, counted)

    whole = score(slice(None), Counted.of(model, batch, config.train, 1).waypoints)
    np.testing.assert_allclose(Counted.of(model, batch, config.train, 1).waypoints, 10)
    share = Counted.of(model, batch, config.train, 2).waypoints
    pieces = [score(slice(first, None, 2), share) for first in range(2)]
    np.testing.assert_allclose(sum(pieces) / 2, whole, rtol=1e-6)
    each = [score(slice(first, None, 2), jnp.float32(count)) for first, count in enumerate((7, 3))]
    assert abs(sum(each) / 2 - whole) > 0.1  # by its own count each

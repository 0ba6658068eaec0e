"""The choices of encoder and decoder beyond the default, on what can be said without golden numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.constants import STATUS_SIZE
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models import coordinate_decoder as grids
from spacedrive_jax.models.coordinate_decoder import (
    CoordinateDecoderConfig,
    Gaussian,
    VaeDecoder,
    kl_divergence,
    make_decoder,
)
from spacedrive_jax.models.coordinate_encoder import (
    CoordinateEncoder,
    CoordinateEncoderConfig,
    EgoStatusEncoder,
    closeness_along_route,
    rotate_features,
    status_units,
)
from spacedrive_jax.models.spacedrive_config import ModelConfig

WIDTH = 48
POINTS = jnp.asarray(np.random.default_rng(0).uniform(-50, 50, (2, 5, 3)), jnp.float32)


@pytest.mark.parametrize("kind", ["sincos", "nerf", "fone"])
def test_learnable_frequencies_start_at_the_fixed_ones(kind):
    config = CoordinateEncoderConfig(kind=kind, base=8.0)
    fixed = CoordinateEncoder(config, WIDTH)
    learnable = CoordinateEncoder(dataclasses.replace(config, learnable_frequencies=True), WIDTH)
    np.testing.assert_array_equal(learnable(POINTS), fixed(POINTS))
    gradient = nnx.grad(lambda encoder: jnp.sum(encoder(POINTS) * jnp.arange(WIDTH)))(learnable)
    assert np.abs(gradient["frequencies"][...]).min() > 0
    assert gradient["frequencies"][...].shape[0] == 3  # every axis its own


def test_fixed_alpha_has_nothing_to_learn():
    encoder = CoordinateEncoder(CoordinateEncoderConfig(alpha=0.02, learnable_alpha=False), WIDTH)
    assert not jax.tree.leaves(nnx.state(encoder, nnx.Param))
    assert float(jnp.abs(encoder(POINTS)).max()) <= 0.02


def test_mlp_encodes_points_while_past_positions_keep_the_waves():
    mlp = CoordinateEncoder(CoordinateEncoderConfig(kind="mlp"), WIDTH, rngs=nnx.Rngs(0))
    waves = CoordinateEncoder(CoordinateEncoderConfig(), WIDTH)
    np.testing.assert_array_equal(mlp.past(POINTS), waves(POINTS))
    assert float(jnp.abs(mlp(POINTS) - waves(POINTS)).max()) > 0.1


def test_rotation_keeps_lengths_and_leaves_the_origin():
    features = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 50)), jnp.float32)
    turned = rotate_features(features, POINTS)
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(features, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(rotate_features(features, jnp.zeros_like(POINTS)), features)


@pytest.mark.parametrize("kind", ["grid_cosine", "grid_l2", "grid_full"])
def test_grid_finds_what_was_encoded(kind):
    grid = grids.GridConfig(minimum=-6.4, cells=32)
    config = CoordinateDecoderConfig(kind=kind, grid=grid)
    decoder = make_decoder(config, WIDTH, 6, rngs=nnx.Rngs(0))
    encoder = CoordinateEncoder(CoordinateEncoderConfig(alpha=1.0), WIDTH)
    truth = jnp.array([[0.0, 0.0, 0.0], [2.3, -4.1, 0.0], [-6.4, 6.0, 0.0]])
    found = jax.jit(lambda hidden: decoder(hidden, encoder))(encoder(truth))
    np.testing.assert_allclose(found[:, :2], truth[:, :2], atol=0.2 if kind != "grid_full" else 0.4)
    assert not jax.tree.leaves(nnx.state(decoder, nnx.Param))


@pytest.mark.parametrize("kind", ["mlp", "linear", "vae"])
def test_accelerators_round_no_metres_to_half_precision(kind):
    config = CoordinateDecoderConfig(kind=kind)
    encoder = CoordinateEncoder(CoordinateEncoderConfig(kind="mlp"), WIDTH, rngs=nnx.Rngs(0))
    status = EgoStatusEncoder(STATUS_SIZE, WIDTH, rngs=nnx.Rngs(0))
    decoder = make_decoder(config, WIDTH, 6, rngs=nnx.Rngs(0))
    for module, inputs in ((encoder, 3), (status, STATUS_SIZE), (decoder, WIDTH)):
        program = str(jax.make_jaxpr(lambda x, module=module: module(x))(jnp.ones((2, inputs))))
        products = program.count("dot_general[")
        assert products
        assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_whole_trajectory_from_one_state():
    decoder = make_decoder(CoordinateDecoderConfig(whole_trajectory=True), WIDTH, 6, rngs=nnx.Rngs(0))
    assert decoder(jnp.ones((2, WIDTH))).shape == (2, 6, 3)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_the_output_scale_is_metres_per_unit(kind):
    plain, scaled = (
        make_decoder(CoordinateDecoderConfig(kind=kind, output_scale=scale), WIDTH, 6, rngs=nnx.Rngs(0))
        for scale in (1.0, 10.0)
    )
    np.testing.assert_allclose(
        scaled(POINTS @ jnp.ones((3, WIDTH))), 10 * plain(POINTS @ jnp.ones((3, WIDTH)))
    )
    with pytest.raises(ConfigError, match=r"output_scale 10.0 is for the kinds mlp and linear"):
        CoordinateDecoderConfig(kind="vae", output_scale=10.0)


def test_the_ego_feature_in_units_and_with_the_route():
    status = jnp.asarray(np.random.default_rng(0).normal(size=(2, STATUS_SIZE)).astype(np.float32))
    nodes = jnp.array([[[20, -3, 0], [40, 8, 0]], [[5, 0, 0], [5, 0, 0]]], jnp.float32)
    raw, scaled = (EgoStatusEncoder(STATUS_SIZE, WIDTH, units=on, rngs=nnx.Rngs(0)) for on in (False, True))
    np.testing.assert_allclose(scaled(status), raw(status / status_units()), atol=1e-6)
    # can_bus of the present state: acceleration, rotation rate, velocity behind command and orientation.
    present = status_units()[2 * 14 : 3 * 14]
    np.testing.assert_allclose(present[[5, 10, 11]], [3.0, 0.2, 8.0])
    turned = status.at[:, [1, 4, 15, 18, 29, 32]].add(0.5)  # orientation: where north lies is not read
    np.testing.assert_array_equal(scaled(turned), scaled(status))
    assert not np.array_equal(raw(turned), raw(status))
    routed = EgoStatusEncoder(STATUS_SIZE, WIDTH, target_points=True, rngs=nnx.Rngs(0))
    inputs = np.concatenate([status, nodes[..., :2].reshape(2, 4) / 10], axis=1)
    by_hand = routed.output(jax.nn.relu(routed.hidden(jnp.asarray(inputs))))
    np.testing.assert_allclose(routed(status, nodes), by_hand, atol=1e-6)
    with pytest.raises(ConfigError, match=r"set model\.ego_status feature or both, not none"):
        ModelConfig(ego_status="none", target_points_in_status=True)


def test_the_ego_feature_reads_who_is_near_in_strips_along_the_route():
    # 8 m ahead, then to the left; five strips from 3 m on the right to 3 m on the left, the route's between.
    nodes = jnp.array([[[8, 0, 0], [8, 8, 0]]], jnp.float32)

    def near(*points: tuple[float, float], nodes: jax.Array = nodes) -> np.ndarray:
        ground = jnp.asarray(points, jnp.float32)
        return np.asarray(closeness_along_route(jnp.pad(ground, ((0, 0), (0, 1)))[None], nodes, 5))

    def strips(**distances: float) -> np.ndarray:
        places = [distances.get(name, np.inf) for name in ("far_right", "right", "route", "left", "far_left")]
        return np.concatenate([np.exp(-np.array(places) / reach) for reach in (10.0, 25.0)])[None]

    # The nearest counts; so far along that the second leg's corner is not beside it.
    np.testing.assert_allclose(near((2, 0), (3, 0)), strips(route=2), atol=1e-6)
    np.testing.assert_allclose(near((3, -3)), strips(far_right=3), atol=1e-6)
    # Half inside each of two strips; behind the corner, and far behind the last node.
    np.testing.assert_allclose(near((3, 0.75)), strips(route=3, left=3) / 2, atol=1e-6)
    np.testing.assert_allclose(near((8, 6)), strips(route=14), atol=1e-6)
    np.testing.assert_allclose(near((11, 20), (-3, 0)), strips(far_right=28), atol=1e-6)
    # On the edge of a strip a point counts nothing there: neither side of a rounding matters.
    np.testing.assert_allclose(near((3, 1.5 - 1e-4)), near((3, 1.5 + 1e-4)), atol=1e-4)
    # A route that ends says its last node twice, and goes straight on; without a route there is nothing.
    ended = nodes.at[:, 1].set(nodes[:, 0])
    np.testing.assert_allclose(near((20, 0), nodes=ended), strips(route=20), atol=1e-6)
    assert not near((3, 0), nodes=0 * nodes).any()
    closeness = jnp.asarray(near((3, 0), (3, 3)))
    status = jnp.ones((1, STATUS_SIZE))
    encoder = EgoStatusEncoder(STATUS_SIZE, WIDTH, strips=5, rngs=nnx.Rngs(0))
    by_hand = encoder.output(jax.nn.relu(encoder.hidden(jnp.concatenate([status, closeness], axis=1))))
    np.testing.assert_allclose(encoder(status, closeness=closeness), by_hand, atol=1e-6)
    with pytest.raises(ConfigError, match=r"visual_positions none reads no depth"):
        ModelConfig(visual_positions="none", target_points_in_status=True, strips_in_status=5)
    with pytest.raises(ConfigError, match=r"strips_in_status 5 lie along the route"):
        ModelConfig(strips_in_status=5)


def test_divergence_is_that_of_normal_distributions():
    one, other = Gaussian(jnp.array([1.0]), jnp.array([0.0])), Gaussian(jnp.array([0.0]), jnp.array([0.0]))
    assert float(kl_divergence(one, one)) == 0.0
    np.testing.assert_allclose(kl_divergence(one, other), 0.5)


def test_vae_without_noise_is_repeatable_and_sees_the_truth_only_in_training():
    decoder = VaeDecoder(WIDTH, 8, with_current=True, rngs=nnx.Rngs(0))
    hidden = jnp.ones((2, 6, WIDTH))
    np.testing.assert_array_equal(decoder(hidden), decoder(hidden))
    seen = [decoder(hidden, true_coordinates=jnp.full((2, 6, 2), value)) for value in (0.0, 5.0)]
    assert float(jnp.abs(seen[0] - seen[1]).max()) > 1e-4
    assert decoder(hidden).shape == (2, 6, 3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", ["sincos", "mlp"])
def test_points_are_lists_or_arrays_of_three_numbers(kind):
    encoder = CoordinateEncoder(CoordinateEncoderConfig(kind=kind), 24, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(encoder([1, 2, 0]), encoder(jnp.array([1.0, 2.0, 0.0])))
    for wrong in (np.zeros((6, 2)), 1.0, np.zeros((3, 6))):
        with pytest.raises(ConfigError, match=r"not \(\.\.\., 3\), x y z"):
            encoder(wrong)

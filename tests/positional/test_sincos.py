import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.positional import sincos
from spacedrive_jax.positional.coordinates import CoordinateEncoder, CoordinateEncoderConfig


@pytest.mark.parametrize("width", [64, 96, 2048, 3584])
def test_encoding_equals_published(golden, width):
    points = np.load(golden / "pe" / "inputs.npz")["coords"]
    expected = np.load(golden / "pe" / "outputs.npz")
    table = sincos.frequencies(sincos.axis_width(width))
    np.testing.assert_allclose(table, expected[f"freq/transformer20000/{width}"].ravel(), rtol=1.2e-7)
    encoded = sincos.encode(jnp.asarray(points), jnp.asarray(table), width)
    np.testing.assert_allclose(encoded, expected[f"pe/transformer20000/{width}"], atol=2e-6)


@pytest.mark.parametrize(("width", "expected"), [(64, 22), (96, 32), (2048, 684), (3584, 1196)])
def test_axis_width(width, expected):
    assert sincos.axis_width(width) == expected


def test_alpha_scales_every_encoding():
    points = jnp.array([[3.0, -2.0, 0.5]])
    small = CoordinateEncoder(CoordinateEncoderConfig(alpha=0.1), 64)(points)
    large = CoordinateEncoder(CoordinateEncoderConfig(alpha=1.0, learnable_alpha=False), 64)(points)
    np.testing.assert_allclose(10 * small, large, rtol=1e-6)

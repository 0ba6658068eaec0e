"""PyTorch's own checkpoint format, with the wrappers that training leaves, gives the same parameters."""

import jax
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.interop.depth_anything import export_module
from spacedrive_jax.interop.unidepth import load_unidepth, unidepth_rules

torch = pytest.importorskip("torch", reason="parity tests need torch")

pytestmark = pytest.mark.parity


def test_pth_equals_safetensors(golden, tmp_path):
    folder = golden / "unidepth_tiny"
    expected = load_unidepth(folder)
    tensors = export_module(expected, unidepth_rules(expected.config))
    state = {f"module.{name}": torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    torch.save({"model": state}, tmp_path / "weights.pth")
    loaded = load_unidepth(tmp_path / "weights.pth", config=expected.config)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(expected))

"""Released checkpoints in PyTorch's own format, read without PyTorch."""

import jax
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.interop.depth_anything import export_module
from spacedrive_jax.interop.torch_file import open_tensors, write_torch_file
from spacedrive_jax.interop.unidepth import load_unidepth, unidepth_rules


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_same_parameters_as_from_safetensors(golden, tmp_path, wrapped):
    expected = load_unidepth(golden / "unidepth_tiny")
    state = dict(export_module(expected, unidepth_rules(expected.config)))
    write_torch_file(tmp_path / "weights.pth", {"model": state, "step": 3} if wrapped else state)
    loaded = load_unidepth(tmp_path / "weights.pth", config=expected.config)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(expected))


def test_other_content_is_named(tmp_path):
    write_torch_file(tmp_path / "weights.pth", {"model": {"a": 1}})
    with pytest.raises(SpaceDriveError, match="does not hold tensors by name"):
        open_tensors(tmp_path / "weights.pth")
    (tmp_path / "other.pth").write_bytes(b"junk")
    with pytest.raises(SpaceDriveError, match="not a zip file"):
        open_tensors(tmp_path / "other.pth")

"""A checkpoint names the base it was trained on, wherever that lies, and goes with no other."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from spacedrive_jax.config import MeshConfig
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.inference.open_model import open_trained_model
from spacedrive_jax.interop.hf_checkpoint import to_hf
from spacedrive_jax.training.fingerprints import state_fingerprint
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import make_model
from spacedrive_jax.training.train import train
from tests.training.runs import losses_of, make_records, tiny


def fingerprint(**arrays):
    state = nnx.State({name: nnx.Param(jnp.asarray(array)) for name, array in arrays.items()})
    return state_fingerprint(state, make_mesh(MeshConfig()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_number_place_name_and_shape_counts(dtype):
    table = jnp.arange(24.0, dtype=dtype).reshape(2, 3, 4)
    base = fingerprint(table=table, bias=jnp.zeros(3, dtype))
    assert base == fingerprint(bias=jnp.zeros(3, dtype), table=table)
    others = [
        fingerprint(table=table.at[1, 2, 3].add(0.125), bias=jnp.zeros(3, dtype)),
        fingerprint(table=table[:, ::-1], bias=jnp.zeros(3, dtype)),
        fingerprint(table=table[::-1], bias=jnp.zeros(3, dtype)),
        fingerprint(table=table.reshape(4, 3, 2), bias=jnp.zeros(3, dtype)),
        fingerprint(tables=table, bias=jnp.zeros(3, dtype)),
        fingerprint(table=table, bias=jnp.zeros(3, dtype).at[0].set(-0.0)),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_a_run_goes_on_with_its_base_from_anywhere_and_with_no_other(tmp_path):
    records, run_dir, weights = make_records(tmp_path / "records"), tmp_path / "run", tmp_path / "weights"

    def config(weights, steps):
        config = tiny(records, run_dir, steps=steps)
        model = dataclasses.replace(config.model, use_lora=True, weights=str(weights))
        return dataclasses.replace(config, model=model)

    to_hf(make_model(tiny(records, run_dir), nnx.Rngs(0)).vlm, weights)
    train(config(weights, 2))

    other = shutil.copytree(weights, tmp_path / "other")
    file = next(other.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "mlp" in name and "visual" not in name)
    tensors[name] = tensors[name] + np.float32(0.01)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SpaceDriveError, match="base_fingerprint"):
        train(config(other, 2), resume=True)

    moved = weights.rename(tmp_path / "moved")
    assert train(config(moved, 2), resume=True).step == 2
    assert open_trained_model(run_dir).config.model.weights == str(moved)
    shutil.rmtree(moved)
    other.rename(moved)
    with pytest.raises(SpaceDriveError, match="base_fingerprint"):
        open_trained_model(run_dir)
    assert len(losses_of(run_dir)) == 2

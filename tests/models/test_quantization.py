"""The base in eight and four bits: integers by hand, the same bits again, and the model that runs on them."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.interop.hf_checkpoint import from_hf, to_hf
from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.language_model import LanguageModel
from spacedrive_jax.models.layers import Projection
from spacedrive_jax.models.partitioning import axis_names
from spacedrive_jax.models.quantization import block_size, dequantize, quantize
from spacedrive_jax.models.spacedrive_config import ModelConfig
from spacedrive_jax.training.fingerprints import state_fingerprint

from .conftest import GOLDEN, tiny_config

KINDS = ("int8", "int4")
SHAPES = {"one input axis": ((128, 6), 1), "heads": ((3, 64, 5), 2), "small blocks": ((3, 20, 4), 2)}


def kernel_of(shape, seed=0):
    return np.random.default_rng(seed).normal(scale=0.02, size=shape).astype(np.float32)


def test_eight_bits_by_hand():
    kernel = np.array([[63.5, -0.25], [0.2, 0.125], [-31.0, 0.0]], np.float32)
    levels, scale = quantize(kernel, "int8", 1)
    # The second scale is 1/508 = 0.0019685, whose nearest bfloat16 is 0.00196838.
    np.testing.assert_array_equal(scale.astype(np.float32), np.array([0.5, 0.00196838379], np.float32))
    np.testing.assert_array_equal(levels, [[127, -127], [0, 64], [-62, 0]])


def test_four_bits_by_hand():
    kernel = np.zeros((128, 1), np.float32)
    kernel[[0, 1, 2], 0] = [7.0, -3.4, 0.6]
    kernel[[64, 65], 0] = [-0.875, 0.2]
    levels, scale = quantize(kernel, "int4", 1)
    np.testing.assert_array_equal(scale.astype(np.float32), [[1.0], [0.125]])
    # Offset by 8; weights 0 and 32 share a byte, as do 64 and 96.
    assert levels.shape == (64, 1)
    assert levels[[0, 1, 2, 3, 32, 33], 0].tolist() == [0x8F, 0x85, 0x89, 0x88, 0x81, 0x8A]
    np.testing.assert_array_equal(
        dequantize(levels, scale)[[0, 1, 2, 64, 65, 96], 0], [7, -3, 1, -0.875, 0.25, 0]
    )


def test_blocks_are_the_largest_that_divide():
    assert [block_size(width) for width in (3584, 3420, 1176, 48)] == [64, 60, 56, 48]
    with pytest.raises(ConfigError, match=r"7 inputs cannot be cut.*int8"):
        block_size(7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SHAPES)
def test_what_is_read_back_quantises_to_the_same_bits(kind, case):
    shape, in_axes = SHAPES[case]
    for seed in range(20):
        kernel = kernel_of(shape, seed)
        kernel[..., -1] = 0  # a channel that was pruned
        levels, scale = quantize(kernel, kind, in_axes)
        weights = dequantize(levels, scale)
        again, scale_again = quantize(weights, kind, in_axes)
        np.testing.assert_array_equal(again, levels)
        np.testing.assert_array_equal(scale_again.view(np.uint16), scale.view(np.uint16))
        step = dequantize(np.full(levels.shape, {"int8": 1, "int4": 0x99}[kind], levels.dtype), scale)
        assert (abs(weights - kernel) <= 0.5 * step + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_devices_quantise_as_the_host_does(kind):
    kernel = kernel_of((3, 64, 5))
    expected = quantize(kernel, kind, 2)
    for ours, theirs in zip(quantize(jnp.asarray(kernel), kind, 2), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_projection_equals_the_one_of_its_weights(kind):
    make = functools.partial(
        Projection, (4, 16), (3, 8), ("heads", "head_dim"), ("mlp", None), bias=True, lora=LoraConfig(rank=2)
    )
    plain = make(compute=ComputeConfig(), rngs=nnx.Rngs(0))
    quantised = make(compute=ComputeConfig(base_quantization=kind), rngs=nnx.Rngs(0))
    weights = dequantize(quantised.kernel[...], quantised.kernel_scale[...])
    assert float(jnp.max(abs(weights - plain.kernel[...]))) < {"int8": 5e-4, "int4": 6e-3}[kind]
    plain.kernel[...] = weights
    x = jnp.asarray(kernel_of((2, 5, 4, 16)))

    def loss(x, projection):
        return jnp.sum(jnp.sin(projection(x))), projection(x)

    ours, theirs = (jax.grad(loss, has_aux=True)(x, each) for each in (quantised, plain))
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_read_into_integers_and_written_back(kind, tmp_path):
    plain = dict(nnx.to_flat_state(nnx.state(from_hf(GOLDEN))))
    compute = ComputeConfig(base_quantization=kind)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = from_hf(GOLDEN, compute=compute, lora=LoraConfig(rank=2), shardings=lambda names, shape: whole)
    state = dict(nnx.to_flat_state(nnx.state(model)))
    path = ("decoder", "layers", "attention", "o", "kernel")
    levels, scale = quantize(np.asarray(plain[path][...])[1], kind, 2)
    np.testing.assert_array_equal(np.asarray(state[path][...])[1], levels)
    np.testing.assert_array_equal(np.asarray(state[(*path[:-1], "kernel_scale")][...])[1], scale)
    assert axis_names(state[path]) == axis_names(plain[path])
    assert all(
        (variable.dtype in (jnp.int8, jnp.uint8)) == ((*place[:-1], "kernel_scale") in state)
        for place, variable in state.items()
        if place[-1] == "kernel"
    )

    to_hf(model, tmp_path / "written")
    again = from_hf(tmp_path / "written", compute=compute, lora=LoraConfig(rank=2))
    for place, variable in nnx.to_flat_state(nnx.state(again)):
        np.testing.assert_array_equal(np.asarray(variable[...]), np.asarray(state[place][...]), str(place))
    assert state_fingerprint(nnx.state(again), mesh) == state_fingerprint(nnx.state(model), mesh)

    to_hf(model, tmp_path / "merged", merged=True)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = next(name for name in merged if name.endswith("layers.1.self_attn.o_proj.weight"))
    expected = dequantize(levels, scale).reshape(-1, scale.shape[-1]).T
    np.testing.assert_allclose(merged[name], expected, atol=1e-7)


def test_a_base_that_trains_is_refused():
    with pytest.raises(ConfigError, match="needs a frozen base"):
        ModelConfig(use_lora=False, compute=ComputeConfig(base_quantization="int8"))


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_integers_makes_no_copy_of_the_stack(kind):
    """Neither of the integers nor of the weights they stand for, which are four to eight times as large."""
    sizes = {"num_layers": 12, "hidden_size": 128, "intermediate_size": 512}
    config = dataclasses.replace(tiny_config().decoder, **sizes)
    lora = LoraConfig(rank=2)

    def construct():
        compute = ComputeConfig(remat="full", base_quantization=kind)
        return LanguageModel(config, compute=compute, rngs=nnx.Rngs(0), lora=lora)

    graph, trainable, frozen = nnx.split(nnx.eval_shape(construct), nnx.LoRAParam, ...)

    def loss(trainable, frozen, token_ids, position_ids):
        model = nnx.merge(graph, trainable, frozen)
        hidden, _ = model(model.embed(token_ids), position_ids, dropout_key=jax.random.key(0))
        return jnp.square(hidden).mean()

    inputs = jax.ShapeDtypeStruct((1, 4), jnp.int32), jax.ShapeDtypeStruct((3, 1, 4), jnp.int32)
    memory = jax.jit(jax.grad(loss)).lower(trainable, frozen, *inputs).compile().memory_analysis()
    numbers = 12 * (128 * 32 * 2 + 128 * 16 * 2 + 3 * 128 * 512)
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen["layers"]))
    assert stored < {"int8": 1.02, "int4": 0.56}[kind] * numbers
    # One block's weights in float32 and what is around them, not twelve blocks'.
    assert memory.temp_size_in_bytes < 4 * numbers / 12 * 3


def test_what_fsdp_gathers_is_what_is_stored():
    script = Path(__file__).with_name("sharded_projection.py")
    path = os.pathsep.join(filter(None, [str(script.parents[2]), os.environ.get("PYTHONPATH")]))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert all(result["difference"] < 0.02 for result in results.values())
    assert ["s8", "128,96"] in results["int8"]["gathered"]
    assert ["u8", "64,96"] in results["int4"]["gathered"]
    # Beside the scales nothing of the kernel goes over the links.
    assert [kind for kind, shape in results["int8"]["gathered"] if shape == "128,96"] == ["s8"]
    assert [kind for kind, shape in results["int4"]["gathered"] if shape != "2,96"] == ["u8"]

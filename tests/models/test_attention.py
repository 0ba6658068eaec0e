"""The fused kernels against the plain one, and which is taken where."""

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

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.models import attention
from spacedrive_jax.models.attention import attend, choose_kernel, splash_attention, splash_blocks


def heads(seed, rows, length, count, channels=16):
    values = np.random.default_rng(seed).normal(size=(rows, length, count, channels))
    return jnp.asarray(values, jnp.float32)


def weighted_sum_and_gradients(function, q, k, v, weights):
    def loss(q, k, v):
        out = function(q, k, v)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize(
    ("length", "keys", "causal", "lengths"),
    [
        pytest.param(300, 300, True, (300, 170), id="causal, padded samples"),
        pytest.param(256, 256, False, None, id="whole image of whole blocks"),
        pytest.param(150, 150, False, None, id="whole image"),
        pytest.param(150, 150, False, (90, 150), id="windows of two sizes"),
        pytest.param(40, 270, False, None, id="other keys than queries"),
    ],
)
def test_splash_equals_plain(length, keys, causal, lengths):
    q, k, v = heads(0, 2, length, 4), heads(1, 2, keys, 2), heads(2, 2, keys, 2)
    counts = None if lengths is None else jnp.asarray(lengths)
    # What comes out behind a sample's end is never read.
    valid = jnp.arange(length) < (jnp.asarray(lengths)[:, None] if causal else jnp.full((2, 1), length))
    weights = heads(3, 2, length, 4) * valid[:, :, None, None]
    plain = functools.partial(attend, choice="xla", causal=causal, lengths=counts)
    fused = functools.partial(
        splash_attention, lengths=None if causal else counts, causal=causal, interpret=True
    )
    expected = weighted_sum_and_gradients(plain, q, k, v, weights)
    found = weighted_sum_and_gradients(fused, q, k, v, weights)
    for ours, theirs in zip(found, expected, strict=True):
        keep = valid[:, :, None, None] if ours.shape[1] == length else True
        np.testing.assert_allclose(ours * keep, theirs * keep, atol=1e-5)
        assert np.isfinite(ours).all()


@pytest.fixture(scope="module")
def on_four_devices():
    """What sharded_attention.py prints, in a process of its own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("sharded_attention.py")],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_splash_on_a_mesh_equals_plain(on_four_devices):
    """Each of four devices runs its rows and heads; forward and gradients."""
    results = on_four_devices["attention"]
    assert all(result["error"] < 1e-5 for result in results.values())
    assert {name: result["per device"] for name, result in results.items()} == {  # rows, heads, key heads
        "rows": [1, 4, 2],
        "rows and heads": [2, 2, 1],
        "fewer key heads than devices": [4, 1, 1],
    }


def test_devices_send_each_other_no_more_than_they_must(on_four_devices):
    shapes = on_four_devices["sent"]
    vocabulary, mlp, length, samples = 512, 48, 40, 8
    whole = [each for each in shapes["gradients"] if vocabulary in each and len(each) > 2]
    assert not whole, "logits of the whole vocabulary"
    assert not [each for each in shapes["gradients"] if mlp in each], "an MLP's weights over tensor"
    scores = [each for each in shapes["gradients"] if sum(size in (length, length // 2) for size in each) > 1]
    assert not scores, "scores of attention"
    assert [vocabulary, 32] not in shapes["gradients"], "the table of embeddings"
    # Devices that share no weights have nothing to say to each other but when all are done.
    assert not [each for each in shapes["tokens"] if samples in each], shapes["tokens"]


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "channels", "causal"),
    [
        pytest.param(3456, 28, 4, 128, True, id="decoder of Qwen2.5-VL-7B"),
        pytest.param(2116, 16, 16, 80, False, id="its vision tower"),
    ],
)
def test_published_sizes_lower_to_a_kernel_for_tpus(monkeypatch, length, heads, kv_heads, channels, causal):
    monkeypatch.setattr(attention, "target_platform", lambda: "tpu")
    q, k = (jax.ShapeDtypeStruct((1, length, count, channels), jnp.bfloat16) for count in (heads, kv_heads))

    def gradients(q, k, v):
        def total(q, k, v):
            return jnp.sum(attend(q, k, v, choice="auto", causal=causal).astype(jnp.float32))

        return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    program = jax.jit(gradients).trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("@tpu_custom_call") == 3  # forward, gradient of queries, of keys and values
    block, padded = splash_blocks(length)
    assert block < padded
    assert f"{length}x{length}x" not in program
    assert f"{padded}x{padded}x" not in program


def test_auto_takes_the_machines_kernel():
    choose = functools.partial(choose_kernel, "auto", masked=True)
    bfloat16, float32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert choose("cpu", bfloat16, 3456, 128) == "xla"
    assert choose("cpu", float32, 2117, 64, masked=False) == "blocks"
    assert choose("cpu", float32, 256, 64, masked=False) == "xla"
    assert choose("tpu", bfloat16, 3456, 128) == "splash"
    assert choose("tpu", float32, 3456, 128) == "splash"
    assert choose("tpu", bfloat16, 64, 80) == "xla"
    assert choose("gpu", bfloat16, 64, 80) == "cudnn"
    assert choose("gpu", float32, 3456, 128) == "xla"
    assert choose("gpu", bfloat16, 3456, 256) == "xla"


@pytest.mark.parametrize("choice", ["splash", "cudnn"])
def test_a_kernel_that_is_not_there_is_an_error(choice):
    q = heads(0, 1, 8, 2)
    with pytest.raises(SpaceDriveError, match=f"model.compute.attention is {choice}"):
        attend(q, q, q, choice=choice)


def test_splash_blocks_cover_with_little_padding():
    assert splash_blocks(3456) == (384, 3456)
    assert splash_blocks(2116) == (384, 2304)
    assert splash_blocks(4096) == (512, 4096)
    assert splash_blocks(64) == (128, 128)

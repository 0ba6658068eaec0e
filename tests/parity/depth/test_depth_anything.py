"""Depth Anything V2 against transformers' torch model and its Pillow image processor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.interop.depth_anything import load_depth_anything

torch = pytest.importorskip("torch", reason="parity tests need torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


def tiny_checkpoint(folder, **changes):
    torch.manual_seed(0)
    backbone = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=70,
        patch_size=14,
        out_indices=[1, 3, 4, 5],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    settings = {
        "backbone_config": backbone,
        "reassemble_hidden_size": 32,
        "neck_hidden_sizes": [8, 12, 16, 20],
        "fusion_hidden_size": 16,
        "depth_estimation_type": "metric",
        "max_depth": 80,
    }
    model = transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(**(settings | changes))
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.11 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("size", [(70, 70), (56, 98)])
def test_depth(tmp_path, size):
    theirs = tiny_checkpoint(tmp_path / "checkpoint")
    ours = load_depth_anything(tmp_path / "checkpoint")
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).predicted_depth.numpy()
    graph, state = nnx.split(ours)
    depth = jax.jit(lambda state, images: nnx.merge(graph, state).network(images))(state, images)
    assert expected.std() > 0.1
    np.testing.assert_allclose(depth, expected, rtol=1e-5)


@pytest.mark.parametrize("image", [(640, 640), (450, 800), (900, 1600), (300, 500)])
def test_input_size_and_pixels(tmp_path, image):
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    tiny_checkpoint(tmp_path / "checkpoint")
    ours = load_depth_anything(tmp_path / "checkpoint")
    side = ours.config.input_side
    processor = DPTImageProcessorPil(
        size={"height": side, "width": side},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        resample=3,
        do_pad=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    pixels = np.random.default_rng(0).integers(0, 256, (*image, 3), dtype=np.uint8)
    expected = processor(images=pixels, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    prepared = np.asarray(ours.prepare(jnp.asarray(pixels)[None])[0])
    assert prepared.shape == expected.shape
    steps = np.abs(prepared - expected) * np.array([0.229, 0.224, 0.225]) * 255
    assert steps.max() < 1.01
    assert (steps > 0.5).mean() < 0.15


def test_relative_depth_is_refused(tmp_path):
    tiny_checkpoint(tmp_path / "checkpoint", depth_estimation_type="relative")
    with pytest.raises(SpaceDriveError, match="relative depth"):
        load_depth_anything(tmp_path / "checkpoint")

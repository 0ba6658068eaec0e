"""What the parity tests of all families share: how close is close, and the adapters' gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from spacedrive_jax.interop.hf_config import format_of
from spacedrive_jax.interop.weight_table import lora_rules
from spacedrive_jax.models.vision_language import VisionLanguageModel

RELATIVE_TOLERANCE = 2e-5
"""Largest difference over the largest magnitude of a tensor."""


def assert_close(ours, theirs, what: str) -> None:
    """Compares an array with a torch tensor."""
    theirs = theirs.detach().numpy()
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{what}: relative error {error:.1e}")
    assert error < RELATIVE_TOLERANCE


def hidden_states(model: VisionLanguageModel, token_ids, images, grid, lengths) -> jax.Array:
    """Input and output of every block, (L+1, B, S, D), as transformers counts them."""
    layout, grids = model.lay_out(token_ids, images, grid, lengths=lengths)
    embeddings, deepstack = model.embed_prompt(jnp.asarray(token_ids), images, layout, grids)
    return model.decoder.hidden_states(
        embeddings, jnp.asarray(layout.position_ids), lengths=jnp.asarray(lengths), deepstack=deepstack
    )


def next_token_loss(
    model: VisionLanguageModel, token_ids: np.ndarray, images: np.ndarray | None, grid: tuple[int, int] | None
) -> jax.Array:
    """Mean cross-entropy of every next token, as transformers has it with labels = input_ids."""
    layout, grids = model.lay_out(token_ids, images, grid)
    embeddings, deepstack = model.embed_prompt(jnp.asarray(token_ids), images, layout, grids)
    hidden, _ = model.decoder(embeddings, jnp.asarray(layout.position_ids), deepstack=deepstack)
    scores = jax.nn.log_softmax(model.decoder.logits(hidden[:, :-1]))
    return -jnp.take_along_axis(scores, jnp.asarray(token_ids)[:, 1:, None], axis=-1).mean()


def assert_same_pixels(model: VisionLanguageModel, processor, to_patches=lambda pixels: pixels) -> None:
    """Compares `process` with transformers' (PIL) processor, bit for bit.

    Args:
        model: the model.
        processor: set up as the model's checkpoint says.
        to_patches: from its `pixel_values` to patches one after the other.
    """
    generator = np.random.default_rng(0)
    sizes = ((50, 70), (240, 320), (16, 20), (300, 40))
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    see_through = Image.fromarray(generator.integers(0, 256, (40, 60, 4), dtype=np.uint8))
    on_white = processor([see_through], return_tensors="np")["pixel_values"]
    wanted = to_patches(on_white)
    np.testing.assert_array_equal(model.process([see_through])[0], wanted.reshape(-1, wanted.shape[-1]))
    expected = processor([Image.fromarray(image) for image in images], return_tensors="np")
    wanted = to_patches(expected["pixel_values"])
    for given in (images, [Image.fromarray(image) for image in images]):
        patches, grid = model.process(given)
        np.testing.assert_array_equal(patches, wanted.reshape(-1, wanted.shape[-1]))
        if "image_grid_thw" in expected:
            np.testing.assert_array_equal(grid, expected["image_grid_thw"][:, 1:])
        else:
            assert len(patches) == grid.prod(axis=1).sum()


def assert_same_lora_gradients(model, adapted, torch_inputs, token_ids, images, grid) -> None:
    """Compares the loss and every adapter matrix's gradient of one sample with peft's."""
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def loss_and_gradient(lora, rest):
        return jax.value_and_grad(
            lambda lora: next_token_loss(nnx.merge(graph, lora, rest), token_ids, images, grid)
        )(lora)

    loss, gradient = loss_and_gradient(lora, rest)
    adapted.zero_grad()
    expected = adapted(**torch_inputs, labels=torch_inputs["input_ids"]).loss
    expected.backward()
    assert_close(loss, expected, "loss")
    parameters = dict(adapted.named_parameters())
    flat = dict(nnx.to_flat_state(gradient))
    rules = lora_rules(model.config.decoder, model.decoder.lora)
    wrapper, module_name = "base_model.model.", format_of(model.config).module_name
    assert {rule.target for rule in rules} == set(flat)
    for rule in rules:
        stacked = np.asarray(flat[rule.target][...])
        for layer, canonical in enumerate(rule.source_names()):
            name = wrapper + module_name(canonical.removeprefix(wrapper))
            theirs = parameters[name.replace(".weight", ".default.weight")].grad
            assert theirs.abs().max() > 0
            assert_close(rule.export(stacked[layer]), theirs, name)

"""What the parity tests of all families compare with transformers and peft, and how close is close."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from spacedrive_jax.interop.hf_checkpoint import from_hf, to_hf
from spacedrive_jax.interop.hf_config import format_of
from spacedrive_jax.interop.peft import load_adapter, read_peft_config, save_adapter
from spacedrive_jax.interop.weight_table import lora_rules
from spacedrive_jax.models.vision_language import VisionLanguageModel
from tests.golden.verify.modules import hidden_states

torch = pytest.importorskip("torch", reason="parity tests need torch")

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


def prompt_hidden_states(model: VisionLanguageModel, token_ids, images, grid, lengths) -> jax.Array:
    """Input and output of every block, (L+1, B, S, D), as transformers counts them."""
    layout, grids = model.lay_out(token_ids, images, grid, lengths=lengths)
    embeddings, deepstack = model.embed_prompt(jnp.asarray(token_ids), images, layout, grids)
    return hidden_states(
        model.decoder,
        embeddings,
        jnp.asarray(layout.position_ids),
        lengths=jnp.asarray(lengths),
        deepstack=deepstack,
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
            np.testing.assert_array_equal(grid, expected["image_grid_thw"])
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


def right_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (B, S), 0 behind each prompt, and lengths."""
    lengths = np.array([len(each) for each in prompts])
    token_ids = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, each in zip(token_ids, prompts, strict=True):
        row[: len(each)] = each
    return token_ids, lengths


def assert_same_hidden_states_and_logits(
    model: VisionLanguageModel,
    theirs: Any,
    token_ids: np.ndarray,
    lengths: np.ndarray,
    images: Mapping[str, Any],
    arguments: Sequence[Mapping[str, Any]],
) -> None:
    """Compares what leaves every block, and the logits, of each sample.

    Args:
        model: the model.
        theirs: transformers'.
        token_ids: right-padded.
        lengths: of the prompts.
        images: `pixel_values` and `image_grid_thw` of all samples.
        arguments: transformers' arguments, sample by sample.
    """
    ours = model.logits(token_ids, lengths=lengths, **images)
    hidden = prompt_hidden_states(model, token_ids, images["pixel_values"], images["image_grid_thw"], lengths)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = theirs(**arguments[row], output_hidden_states=True)
        assert len(expected.hidden_states) == len(hidden)
        for layer, each in enumerate(expected.hidden_states):
            assert_close(hidden[layer, row, :length], each[0], f"hidden state {layer}")
        assert_close(ours[row, :length], expected.logits[0], "logits")


def assert_same_answers(
    model: VisionLanguageModel,
    theirs: Any,
    token_ids: np.ndarray,
    lengths: np.ndarray,
    images: Mapping[str, Any],
    arguments: Sequence[Mapping[str, Any]],
) -> np.ndarray:
    """Compares twelve generated ids of each sample; the arguments are those of the function above."""
    ours = model.generate(token_ids, lengths=lengths, max_new_tokens=12, stop_ids=(), **images)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = theirs.generate(**arguments[row], **greedy)
        np.testing.assert_array_equal(ours[row], expected[0, length:].numpy())
    assert len(np.unique(ours)) > 4  # not one token again and again
    return ours


def assert_bit_exact_export(
    model: VisionLanguageModel, theirs: Any, folder: Path, *, naming: str, max_shard_bytes: int
) -> Any:
    """Exports in several files, has transformers load them, and compares every tensor; returns its model."""
    to_hf(model, folder, naming=naming, max_shard_bytes=max_shard_bytes)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    again, report = type(theirs).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    _assert_same_tensors(again, theirs)
    return again.eval()


def _assert_same_tensors(ours: Any, theirs: Any) -> None:
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def assert_same_adapters(
    folder: Path,
    theirs: Any,
    settings: Any,
    token_ids: np.ndarray,
    images: Mapping[str, Any],
    arguments: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    """Random adapters of peft's, read, differentiated, written and merged.

    Args:
        folder: the base.
        theirs: transformers' model of it.
        settings: peft's `LoraConfig`.
        token_ids: one sample, (1, S).
        images: its `pixel_values` and `image_grid_thw`.
        arguments: transformers' arguments for it.
        tmp_path: to write into.
    """
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)

    def base() -> Any:
        return type(theirs).from_pretrained(folder, dtype=torch.float32)

    adapted = peft.get_peft_model(base(), settings).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    adapted.save_pretrained(tmp_path / "theirs")
    lora = read_peft_config(tmp_path / "theirs")
    assert (lora.rank, lora.scaling) == (settings.r, settings.lora_alpha / settings.r)
    model = from_hf(folder, lora=lora)
    load_adapter(model, tmp_path / "theirs")
    ours = model.logits(token_ids, **images)
    with torch.no_grad():
        expected, plain = adapted(**arguments).logits[0], theirs(**arguments).logits[0]
    assert (expected - plain).abs().max() > 0.01
    assert_close(ours[0], expected, "adapted logits")
    assert_same_lora_gradients(
        model, adapted, arguments, token_ids, images["pixel_values"], images["image_grid_thw"]
    )

    save_adapter(model, tmp_path / "ours", base_model=str(folder))
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    _assert_same_tensors(again, adapted)
    to_hf(model, tmp_path / "merged", merged=True)
    merged = type(theirs).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        # Of equal weights; torch's last bit depends on where in memory they lie.
        assert_close(again(**arguments).logits[0], expected, "logits of the exported adapters")
        assert_close(ours[0], merged(**arguments).logits[0], "logits of the merged export")

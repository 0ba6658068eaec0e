"""The whole model against numbers of the published implementation (Qwen, SpaceDrive+)."""

import jax
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.config import TrainConfig
from spacedrive_jax.training.losses import losses
from spacedrive_jax.training.state import is_trainable
from tests.published_case import HEADS, PublishedCase, load_case


@pytest.fixture(scope="module")
def case() -> PublishedCase:
    return load_case("spacedrive_train")


@pytest.fixture(scope="module")
def result(case):
    graph, trainable, frozen = nnx.split(case.model, is_trainable(True), ...)

    @jax.jit
    def evaluate(trainable, frozen, batch):
        def total(trainable):
            model = nnx.merge(graph, trainable, frozen)
            parts = losses(model, batch, TrainConfig(), None)
            return parts.total, (parts, model(batch).waypoints)

        return jax.value_and_grad(total, has_aux=True)(trainable)

    (_, (parts, waypoints)), gradients = evaluate(trainable, frozen, case.batch)
    return parts, waypoints, nnx.to_pure_dict(gradients)


def test_token_layout(case):
    length = int(case.batch.lengths[0])
    np.testing.assert_array_equal(case.batch.token_ids[0, :length], case.outputs["input_ids"][0])
    np.testing.assert_array_equal(case.batch.positions[0, :, :length], case.outputs["position_ids"][:, 0])
    expected = case.outputs["labels_for_ce"][0]
    supervised = np.flatnonzero(expected != -100)
    mask = np.asarray(case.batch.target_mask[0])
    np.testing.assert_array_equal(case.batch.target_places[0][mask], supervised - 1)
    np.testing.assert_array_equal(case.batch.target_ids[0][mask], expected[supervised])


def test_losses(case, result):
    parts, waypoints, _ = result
    np.testing.assert_allclose(parts.language, case.outputs["losses/vlm_loss"], rtol=1e-5)
    np.testing.assert_allclose(parts.position, case.outputs["losses/loss_pos"], rtol=1e-5)
    np.testing.assert_allclose(parts.total, case.outputs["losses/total"], rtol=1e-5)
    np.testing.assert_allclose(waypoints, case.outputs["decoded_coords"], atol=5e-5)


def assert_gradient(actual, expected):
    # The published tolerance: 1e-4 of the tensor's largest entry.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("projection", ["q", "k", "v", "o"])
@pytest.mark.parametrize("side", ["a", "b"])
def test_lora_gradients(case, result, projection, side):
    gradient = result[2]["vlm"]["decoder"]["layers"]["attention"][projection]["adapter"][side]
    for layer in range(3):
        name = f"layers.{layer}.self_attn.{projection}_proj.lora_{side.upper()}.weight"
        expected = case.outputs[f"grad/base_model.model.model.language_model.{name}"].T
        assert_gradient(gradient[layer].reshape(expected.shape), expected)


def test_gradients_outside_the_adapters(case, result):
    gradients, published = result[2], case.outputs
    for target, source in HEADS.items():
        module, layer = target.split(".")
        assert_gradient(gradients[module][layer]["kernel"], published[f"grad/{source}.weight"].T)
        assert_gradient(gradients[module][layer]["bias"], published[f"grad/{source}.bias"])
    decoder = gradients["vlm"]["decoder"]
    assert_gradient(decoder["new_embedding"], published["grad/new_embed_tokens.weight"])
    assert_gradient(decoder["new_head"], published["grad/new_lm_head.weight"])
    assert_gradient(gradients["encoder"]["alpha"], published["grad/pe_scaling"].reshape(()))

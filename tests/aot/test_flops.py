import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from spacedrive_jax.config import load_config
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.families.llava import ClipVisionConfig, Llava, LlavaConfig
from spacedrive_jax.models.families.llava import lora as llava_lora
from spacedrive_jax.models.language_model import LanguageModel
from spacedrive_jax.training.sharding import batch_sharding, make_mesh
from spacedrive_jax.training.step import batch_spec, make_train_step
from spacedrive_jax.training.throughput import (
    adapter_flops,
    decoder_flops,
    plan_step_flops,
    train_step_flops,
    vision_flops,
)
from tests.conftest import ROOT
from tests.record_factory import encode_png, make_record

TINY = ROOT / "tests" / "tiny_config.py"


def product_flops(jaxpr) -> int:
    """Twice the multiply-adds of all matrix products in a jaxpr, scans counted in full."""
    total = 0
    for equation in jaxpr.eqns:
        inner = sum(product_flops(sub) for sub in jaxprs_in_params(equation.params))
        total += inner * equation.params.get("length", 1)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
    return total


def test_decoder_count_is_that_of_the_traced_program():
    model = load_config(str(TINY)).model
    config, length = model.vlm.decoder, 24

    def forward(lora):
        decoder = nnx.eval_shape(
            lambda: LanguageModel(config, compute=ComputeConfig(), rngs=nnx.Rngs(0), lora=lora)
        )
        graph, state = nnx.split(decoder)

        def run(state, x, p):
            return nnx.merge(graph, state)(x, p)[0]

        x, p = jnp.zeros((1, length, config.hidden_size)), jnp.zeros((3, 1, length), jnp.int32)
        return product_flops(jax.make_jaxpr(run)(state, x, p).jaxpr)

    products, causal = decoder_flops(config, length)
    assert forward(None) == products + 2 * causal  # the program computes both halves
    with_lora = dataclasses.replace(model, use_lora=True, lora=LoraConfig(rank=4))
    assert forward(with_lora.lora) - forward(None) == adapter_flops(with_lora, length)


def llava():
    """The tiny config on a tiny LLaVA."""
    config = load_config(str(TINY))
    decoder = dataclasses.replace(config.model.vlm.decoder, mrope_section=(8,), qkv_bias=False)
    vision = ClipVisionConfig(
        hidden_size=16, intermediate_size=24, depth=3, num_heads=2, image_size=56, feature_layer=-3
    )
    vlm = LlavaConfig(decoder=decoder, vision=vision, image_token_id=config.model.vlm.image_token_id)
    lora = llava_lora(4)
    model = dataclasses.replace(config.model, vlm=vlm, lora=lora)
    return dataclasses.replace(
        config, model=model, data=dataclasses.replace(config.data, sequence_length=256)
    )


def test_llava_vision_count_is_that_of_the_traced_program():
    model = llava().model
    vision = model.vlm.vision
    tower = nnx.eval_shape(lambda: Llava(model.vlm, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(tower)

    def run(state, pixels):
        return nnx.merge(graph, state).encode_images(pixels, (4, 4))

    pixels = jnp.zeros((1, 16, vision.patch_channels))
    traced = product_flops(jax.make_jaxpr(run)(state, pixels).jaxpr)
    # The blocks behind the feature layer are in the program, in a branch that is not taken.
    unused = vision.depth - vision.used_blocks
    assert unused == 2
    block = (
        vision_flops(model, (56, 56)) - vision_flops(without_blocks(model), (56, 56))
    ) // vision.used_blocks
    assert traced == vision_flops(model, (56, 56)) + unused * block


def without_blocks(model):
    vision = dataclasses.replace(model.vlm.vision, feature_layer=-model.vlm.vision.depth - 1)
    return dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, vision=vision))


def test_the_published_model_has_known_sizes():
    config = load_config("spacedrive_plus_qwen_7b")
    products, _ = decoder_flops(config.model.vlm.decoder, 1)
    # 6.53 G weights in the blocks (the language model without its two vocabulary tables), 2 FLOPs each.
    assert round(products / 2e9, 2) == 6.53
    flops = train_step_flops(config)
    # A frozen base: forward, and backward to activations; the vision tower only forward.
    assert flops.vision_forward == 16 * 6 * vision_flops(config.model, (640, 640))
    assert flops.backward < 1.4 * flops.decoder_forward
    trained = dataclasses.replace(config, model=dataclasses.replace(config.model, use_lora=False))
    assert train_step_flops(trained).backward > 2 * (flops.vision_forward + flops.decoder_forward)


@pytest.mark.parametrize("config", [load_config(str(TINY)), llava()], ids=["qwen", "llava"])
def test_batch_spec_is_what_the_pipeline_makes(config):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_coordinates=9))
    rng = np.random.default_rng(0)
    png = encode_png((rng.uniform(3, 60, (45, 80)) * 256).astype(np.uint16))
    sample = SampleBuilder(config.data, config.model)(make_record(rng, exact_depth=[png] * 6), 0)
    expected = batch_spec(config, 4, sharding=batch_sharding(make_mesh(config.mesh)))
    jax.tree.map(lambda value, leaf: np.testing.assert_equal((4, *value.shape), leaf.shape), sample, expected)
    jax.tree.map(lambda value, leaf: np.testing.assert_equal(value.dtype, leaf.dtype), sample, expected)


def test_llava_training_and_planning_steps_can_be_planned():
    """Lowering is enough: what is compiled is the compiler's business."""
    config = llava()
    mesh = make_mesh(config.mesh)
    batch = batch_spec(config, 4, sharding=batch_sharding(mesh))
    step = make_train_step(config, mesh)
    number = jax.ShapeDtypeStruct((), np.int32)
    step.run.lower(step.trainable, step.optimizer_state, step.frozen, batch, number)
    training, planning = train_step_flops(config), plan_step_flops(config, 31)
    assert training.vision_forward == planning.vision_forward == 4 * 6 * vision_flops(config.model, (56, 56))
    assert planning.decoder_forward > training.decoder_forward
    assert planning.model == planning.hardware

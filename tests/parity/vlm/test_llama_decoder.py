"""The same decoder as LLaMA (what LLaVA-1.5 is built on): no biases, one-dimensional rotary embedding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spacedrive_jax.vlm import ComputeConfig, Decoder, DecoderConfig
from spacedrive_jax.vlm.checkpoint import fill
from spacedrive_jax.vlm.conversion import check_names_and_shapes, decoder_rules

torch = pytest.importorskip("torch", reason="parity tests need torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


class Tensors(dict):
    read = dict.__getitem__


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, False), (2, True)])
def test_hidden_states_and_logits(kv_heads, tied):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            tie_word_embeddings=tied,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    config = DecoderConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=16,
        rope_theta=1e4,
        rope_sections=(8,),
        norm_eps=1e-5,
        qkv_bias=False,
        tied_head=tied,
    )
    rules = decoder_rules(config, prefix="model")
    tensors = Tensors((name, value.numpy()) for name, value in theirs.state_dict().items())
    ignore = ["lm_head.weight"] if tied else []
    shapes = {name: value.shape for name, value in tensors.items()}
    check_names_and_shapes(rules, shapes, origin="LLaMA", ignore=ignore)
    abstract = nnx.eval_shape(lambda: Decoder(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    flat = {("decoder", *path): variable for path, variable in nnx.to_flat_state(state)}
    fill(flat, rules, tensors)
    ours = nnx.merge(graph, nnx.from_flat_state({path[1:]: value for path, value in flat.items()}))

    token_ids = np.random.default_rng(0).integers(0, 128, (2, 17))
    with torch.no_grad():
        expected = theirs(torch.tensor(token_ids), output_hidden_states=True)
    positions = jnp.broadcast_to(jnp.arange(17), (3, 2, 17))
    hidden = ours.hidden_states(ours.embed(jnp.asarray(token_ids)), positions)
    for layer, each in enumerate(expected.hidden_states):
        assert np.abs(hidden[layer] - each.numpy()).max() < 2e-5 * np.abs(each.numpy()).max()
    logits = expected.logits.numpy()
    assert np.abs(ours.logits(hidden[-1]) - logits).max() < 2e-5 * np.abs(logits).max()

"""Run by sharded_attention.py: what four fake devices send each other.

Compiles a small language model, forward and backward and token by token, and lists the arrays that its
collectives give back.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from flax import nnx

from spacedrive_jax.config import MeshConfig
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig, LoraConfig, NewTokensConfig
from spacedrive_jax.models.language_model import LanguageModel, NewTokenParam
from spacedrive_jax.models.partitioning import activations_on, axis_names
from spacedrive_jax.training.losses import label_cross_entropy
from spacedrive_jax.training.sharding import batch_sharding, make_mesh, parameter_sharding

SAMPLES, LENGTH, TARGETS = 8, 40, 6
CONFIG = LanguageModelConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    mrope_section=(8,),
)


def build() -> LanguageModel:
    adapters, rows = LoraConfig(rank=3, dropout=0.0), NewTokensConfig(first_id=100)
    compute = ComputeConfig(remat="attention")
    return LanguageModel(CONFIG, compute=compute, rngs=nnx.Rngs(0), lora=adapters, new_tokens=rows)


def sent(sizes: tuple[int, int, int], program) -> list[list[int]]:
    """Shapes that the collectives of a program give back, on a mesh of these sizes."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices())
    graph, state = nnx.split(nnx.eval_shape(build))
    placed = []
    for path, variable in nnx.to_flat_state(state):
        sharding = parameter_sharding(axis_names(variable), variable.shape, mesh)
        array = jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)
        placed.append((path, variable.replace(array)))
    rows = batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((SAMPLES, LENGTH), jnp.int32, sharding=rows)
    lengths = jax.ShapeDtypeStruct((SAMPLES,), jnp.int32, sharding=rows)

    def run(state, ids, lengths):
        with activations_on(mesh):
            return program(graph, state, ids, lengths)

    lowered = jax.jit(run).lower(nnx.from_flat_state(placed), ids, lengths)
    text = lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
    results = re.findall(r" = (\S+|\(.*?\)) (?:all-|reduce-scatter|collective-permute)[\w-]*\(", text)
    shapes = {
        tuple(map(int, dims.split(","))) for each in results for dims in re.findall(r"\[([\d,]+)\]", each)
    }
    return sorted(map(list, shapes))


def positions() -> jax.Array:
    return jnp.broadcast_to(jnp.arange(LENGTH), (1, SAMPLES, LENGTH))


def gradients(graph, state, ids, lengths):
    """Of a training step's cross-entropy by adapters and new rows."""
    trainable, frozen = nnx.split_state(state, nnx.Any(nnx.LoRAParam, NewTokenParam), ...)

    def loss(trainable):
        model = nnx.merge(graph, trainable, frozen)
        hidden, _ = model(model.embed(ids), positions(), lengths=lengths)
        return jnp.mean(label_cross_entropy(model.logits, hidden[:, :TARGETS], ids[:, :TARGETS]))

    return jax.grad(loss)(trainable)


def tokens(graph, state, ids, lengths):
    """Of a few steps of generation."""
    model = nnx.merge(graph, state)
    hidden, cache = model.prefill(model.embed(ids), positions(), lengths=lengths, room=4)

    def step(progress):
        number, last, cache = progress
        chosen = jnp.argmax(model.logits(last), axis=-1)[:, None]
        hidden, cache = model(model.embed(chosen), cache.lengths[None, :, None], cache=cache)
        return number + 1, hidden[:, 0], cache

    return jax.lax.while_loop(lambda progress: progress[0] < 4, step, (0, hidden[:, 0], cache))[1]


def main() -> dict[str, list[list[int]]]:
    return {"gradients": sent((1, 2, 2), gradients), "tokens": sent((4, 1, 1), tokens)}

"""SpaceDrive+ at the published sizes, or at a tiny one, with random weights that take no room to draw."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from benchmarks.gpu.rows import Size
from spacedrive_jax.config import Config, change, load_config
from spacedrive_jax.models.families.qwen2_5_vl import QwenVLConfig
from spacedrive_jax.models.layers import INIT_STD
from spacedrive_jax.models.partitioning import draw_parameters
from spacedrive_jax.training.sharding import parameter_sharding
from spacedrive_jax.training.state import abstract_state, is_trainable, make_model

Model = Literal["3b", "7b"]
MODELS = {"3b": QwenVLConfig.qwen2_5_vl_3b, "7b": QwenVLConfig.qwen2_5_vl_7b}
PROMPT_LENGTH = 3392
"""Tokens of the published planning prompt, in steps of 64."""


def make_config(model: Model, size: Size, fields: dict[str, Any]) -> Config:
    """The published run on one device; `tiny` keeps every part of it and little else."""
    vlm = MODELS[model]()
    if size == "tiny":
        decoder = dataclasses.replace(
            vlm.decoder,
            vocab_size=2048,
            hidden_size=64,
            intermediate_size=96,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            mrope_section=(2, 3, 3),
        )
        vision = dataclasses.replace(
            vlm.vision,
            hidden_size=32,
            intermediate_size=48,
            depth=2,
            num_heads=2,
            full_attention_blocks=(1,),
            out_hidden_size=64,
        )
        ids = {"image_token_id": 2000, "vision_start_token_id": 2001, "vision_end_token_id": 2002}
        vlm = dataclasses.replace(vlm, decoder=decoder, vision=vision, **ids)
        fields = fields | {"data.image_size": (56, 56), "data.sequence_length": 192}
    fields = {"model.vlm": vlm, "mesh.data": 1} | fields
    return change(load_config("spacedrive_plus_qwen_7b"), f"spacedrive_plus_qwen_{model}", fields)


def random_state(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Graph, trainable and frozen numbers of a config.

    What trains is drawn as training draws it. The frozen base is drawn array by array, in pieces: drawing it
    in one program would take more memory than the step that is to be measured.
    """
    graph, _, frozen = abstract_state(config, mesh)
    trainable = draw_parameters(
        functools.partial(make_model, config),
        seed=0,
        wanted=is_trainable(config.model.use_lora),
        shardings=functools.partial(parameter_sharding, mesh=mesh),
    )
    drawn = [
        (path, variable.replace(_draw(str(path[-1]), variable.get_value(), seed)))
        for seed, (path, variable) in enumerate(nnx.to_flat_state(frozen))
    ]
    return graph, trainable, nnx.from_flat_state(drawn)


def _draw(name: str, wanted: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    if name in ("scale", "bias"):  # of norms and projections, as they start
        value = jnp.full(wanted.shape, name == "scale", wanted.dtype)
        return jax.device_put(value, wanted.sharding)
    if name == "kernel_scale":  # of integers that spread over all levels
        value = jnp.full(wanted.shape, INIT_STD / 3 if wanted.ndim > 3 else INIT_STD / 64, wanted.dtype)
        return jax.device_put(value, wanted.sharding)
    pieces = math.gcd(wanted.size, 64)

    @functools.partial(jax.jit, out_shardings=wanted.sharding)
    def draw(key: jax.Array) -> jax.Array:
        def piece(key: jax.Array) -> jax.Array:
            size = (wanted.size // pieces,)
            if jnp.issubdtype(wanted.dtype, jnp.integer):
                return jax.random.bits(key, size, jnp.uint8).astype(wanted.dtype)
            return (INIT_STD * jax.random.normal(key, size)).astype(wanted.dtype)

        return jax.lax.map(piece, jax.random.split(key, pieces)).reshape(wanted.shape)

    return draw(jax.random.key(seed))

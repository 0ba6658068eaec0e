"""What a step takes at least in each chip's memory, from shapes alone; what a compiler says it takes."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from spacedrive_jax.config import Config


def bytes_per_chip(tree: Any) -> int:
    """Bytes of one chip's shards of all arrays in a tree, abstract or real."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "sharding")
    )


def residual_bytes(config: Config, mesh: Mesh) -> int:
    """The residual stream that the decoder's scan keeps between its blocks for the backward pass."""
    decoder, length = config.model.vlm.decoder, config.data.sequence_length
    if length % mesh.shape["tensor"] == 0:
        length //= mesh.shape["tensor"]
    width = decoder.hidden_size * config.model.compute.activation_dtype.itemsize
    return decoder.num_layers * _samples_per_chip(config, mesh) * length * width


def product_bytes(config: Config, mesh: Mesh) -> int:
    """What the decoder's blocks keep for the backward pass besides the residual stream.

    A lower bound: the products with the base's weights that their backward pass needs (query, key, value,
    attention's output, gate, up), and the attention scores where they are written out; adapters, norms and
    the vision tower's blocks come on top. Nothing with remat `full`; with `attention` no gate and up, but
    what attention gives.
    """
    compute, decoder, length = config.model.compute, config.model.vlm.decoder, config.data.sequence_length
    if compute.remat == "full":
        return 0
    heads = decoder.num_heads + 2 * decoder.num_kv_heads
    width = heads * decoder.head_dim + decoder.hidden_size
    if compute.remat in ("attention", "attention_mlp"):
        width += decoder.num_heads * decoder.head_dim  # what is attended to; the residual is counted above
    if compute.remat != "attention":
        width += 2 * decoder.intermediate_size
    kept = length * width * compute.activation_dtype.itemsize
    if compute.remat in ("none", "dots") and compute.attention == "xla":
        kept += decoder.num_heads * length * length * compute.activation_dtype.itemsize
    return decoder.num_layers * _samples_per_chip(config, mesh) * kept // mesh.shape["tensor"]


def cache_bytes(config: Config, mesh: Mesh) -> int:
    """Keys and values of the prompts in the planning step."""
    decoder, samples = config.model.vlm.decoder, _samples_per_chip(config, mesh)
    token = 2 * decoder.num_kv_heads * decoder.head_dim * config.model.compute.activation_dtype.itemsize
    return decoder.num_layers * samples * config.data.sequence_length * token // mesh.shape["tensor"]


def out_of_memory(message: str) -> tuple[int, str] | None:
    """Reads a compiler's error.

    Returns:
        Bytes that it says it needed (0 where it names none) and its own words; None where the error is
        another one.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    said = re.search(r"Ran out of memory[^\n]*", message)
    reason = (said[0] if said else message.splitlines()[0])[:300]
    # "required for HLO temporaries (47.68G) exceeds available HBM (15.75G)", or "Used 20.4G of 15.75G hbm"
    number = re.search(r"required[^()\n]*\(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT])", message)
    if number is None:
        return 0, reason
    count, unit = [group for group in number.groups() if group]
    return int(float(count) * 1024 ** " KMGT".index(unit)), reason


def _samples_per_chip(config: Config, mesh: Mesh) -> int:
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.grad_accum_steps
    return max(config.train.batch_size // ways, 1)

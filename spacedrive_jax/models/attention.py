"""Attention over a whole sequence, by the kernel that suits the machine; and the memory of keys and values.

`xla` writes the scores of all pairs out; the fused kernels never do, neither forward nor backward, nor do
the blocks that CPUs take for long sequences. All give the same numbers but for the order of sums. Single
tokens against a `KVCache` take XLA's own attention (`language_model`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import AttentionChoice
from spacedrive_jax.models.partitioning import constrain, current_mesh, logical_to_mesh_axes

# Attention for CPUs: a block of one head's queries at a time, so that its scores stay in the cache.
#
# Written out whole, the scores of a 644x644 image's 2117 tokens take 18 MB a head, and moving them costs
# several times the arithmetic.


BLOCK = 256
"""Queries whose scores are held at once: 2 MB in float32 for 2117 keys."""


def blocked_attention(
    q: Float[Array, "B S heads H"], k: Float[Array, "B K kv_heads H"], v: Float[Array, "B K kv_heads H"]
) -> Float[Array, "B S heads H"]:
    """Softmax attention of every query to every key, with grouped queries, scaled by 1 / sqrt(H).

    Scores and sums are float32. The backward pass computes a block's scores again.
    """
    rows, length, heads, channels = q.shape
    groups = heads // k.shape[2]
    blocks = -(-length // BLOCK)
    padded = jnp.pad(q, ((0, 0), (0, blocks * BLOCK - length), (0, 0), (0, 0)))
    queries = jnp.swapaxes(padded, 1, 2).reshape(rows * heads * blocks, BLOCK, channels)
    keys, values = (jnp.swapaxes(each, 1, 2).reshape(-1, *each.shape[1::2]) for each in (k, v))

    @jax.checkpoint
    def one(block: Float[Array, "Q H"], head: Array) -> Float[Array, "Q H"]:
        scores = jnp.matmul(block, keys[head].T, preferred_element_type=jnp.float32) * channels**-0.5
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        mixed = jnp.matmul(weights.astype(v.dtype), values[head], preferred_element_type=jnp.float32)
        return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)

    key_heads = jnp.arange(rows * heads * blocks) // (blocks * groups)
    out = jax.lax.map(lambda inputs: one(*inputs), (queries, key_heads))
    whole = out.reshape(rows, heads, blocks * BLOCK, channels)[:, :, :length]
    return jnp.swapaxes(whole, 1, 2)


log = logging.getLogger(__name__)

Kernel = Literal["xla", "blocks", "cudnn", "splash"]
Queries = Float[Array, "B S heads H"]
KeysValues = Float[Array, "B K kv_heads H"]
ShardAxes = tuple[str, str | None, str | None]
"""Logical names of the axes B, heads and kv_heads."""

DECODER_AXES: ShardAxes = ("batch", "heads", "kv_heads")
IMAGE_AXES: ShardAxes = ("images", None, None)
SHORTEST_FOR_SPLASH = 256
"""Tokens below which scores are small and the kernel's blocks mostly padding."""
SHORTEST_FOR_BLOCKS = 1024
"""Tokens below which a head's scores fit into a CPU's cache as they are."""
SPLASH_BLOCKS = (512, 384, 256)
LANES = 128
"""Block sizes are multiples of a TPU register's width."""


def attend(
    q: Queries,
    k: KeysValues,
    v: KeysValues,
    *,
    choice: AttentionChoice,
    causal: bool = False,
    lengths: Int[Array, " B"] | None = None,
    axes: ShardAxes = DECODER_AXES,
) -> Queries:
    """Softmax attention with grouped queries, scaled by 1 / sqrt(H). Causal attention has K = S.

    Args:
        q: queries.
        k: keys.
        v: values.
        choice: which kernel; see `choose_kernel`.
        causal: a token sees itself and those before it.
        lengths: valid keys of each right-padded row; None when all are. What comes out behind them is
            finite but means nothing.
        axes: what the axes are called, for the fused kernels on a mesh: each device runs its own rows and
            heads.

    Raises:
        ConfigError: the kernel asked for does not run on this machine or with this type.
    """
    k, v = (repeat_kv_heads(each, q.shape[2], axes) for each in (k, v))
    length, head_dim = k.shape[1], k.shape[3]
    platform = target_platform()
    masked = causal or lengths is not None
    kernel = choose_kernel(choice, platform, q.dtype, length, head_dim, masked=masked)
    # Where there was a choice; on a CPU plain attention is all there is.
    level = logging.DEBUG if (platform, kernel) == ("cpu", "xla") else logging.INFO
    log.log(level, "attention over %d tokens of %d channels on %s: %s", length, head_dim, platform, kernel)
    if kernel == "blocks":
        return _on_shards(lambda q, k, v, _: blocked_attention(q, k, v), q, k, v, None, axes)
    if kernel == "xla":
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="xla"
        )
    if causal:
        lengths = None  # no valid token sees what stands behind it: the padding is hidden already
    run = _cudnn if kernel == "cudnn" else splash_attention
    return _on_shards(functools.partial(run, causal=causal), q, k, v, lengths, axes)


def repeat_kv_heads(
    x: KeysValues, heads: int, axes: ShardAxes = DECODER_AXES
) -> Float[Array, "B K repeated H"]:
    """Keys or values for queries that lie over more devices than they have heads: each head as often as it
    takes for a device to hold those that its own queries look at, and no others.

    Without it the partitioner puts the scores of all heads on every device. As they are where they divide.

    Args:
        x: keys or values.
        heads: of the queries.
        axes: see `attend`.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    over = logical_to_mesh_axes((axes[1],), (heads,), mesh)[0]
    ways = 1 if over is None else mesh.shape[over]
    count = x.shape[2]
    repeats = next(
        times
        for times in range(1, heads // count + 1)
        if not (heads // count % times or count * times % ways)
    )
    if repeats == 1:
        return x
    return constrain(jnp.repeat(x, repeats, axis=2), axes[0], None, axes[2], None)


def target_platform() -> str:
    """`cpu`, `gpu` or `tpu`: what the program being traced is for.

    On a mesh it is the mesh's devices, which a program compiled ahead of time need not have.
    """
    mesh = current_mesh()
    device = None if mesh is None else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def choose_kernel(
    choice: AttentionChoice, platform: str, dtype: jnp.dtype, length: int, head_dim: int, *, masked: bool
) -> Kernel:
    """The kernel for one attention.

    Args:
        choice: `auto` takes the fused kernel of the platform wherever it suits, else `xla`. A fused kernel
            by name stands for the same, but must fit the machine. Sequences shorter than
            `SHORTEST_FOR_SPLASH` (windows of a vision tower) are left to `xla` on TPUs.
        platform: see `target_platform`.
        dtype: of queries, keys and values.
        length: K.
        head_dim: H.
        masked: whether some token does not see all others; the CPU's `blocks` know no mask.

    Raises:
        ConfigError: A fused kernel is asked for by name where it does not run.
    """
    half = dtype in (jnp.bfloat16, jnp.float16)
    if choice == "xla":
        return "xla"
    if choice == "auto" and platform not in ("gpu", "tpu"):
        return "blocks" if length >= SHORTEST_FOR_BLOCKS and not masked else "xla"
    if choice == "splash" and platform != "tpu":
        raise ConfigError(
            f"model.compute.attention is splash, a TPU kernel, but this runs on {platform}: take auto"
        )
    if choice == "cudnn" and (platform != "gpu" or not half or head_dim % 8 or head_dim > 128):
        raise ConfigError(
            "model.compute.attention is cudnn, which needs an NVIDIA GPU, model.compute.dtype bfloat16 or "
            f"float16 and heads of at most 128 channels in steps of 8; this is {platform}, {dtype}, "
            f"{head_dim} channels: take auto"
        )
    if platform == "tpu":
        return "splash" if length >= SHORTEST_FOR_SPLASH else "xla"
    return "cudnn" if half and head_dim % 8 == 0 and head_dim <= 128 else "xla"


def _on_shards(
    kernel: Callable[..., Queries],
    q: Queries,
    k: KeysValues,
    v: KeysValues,
    lengths: Int[Array, " B"] | None,
    axes: ShardAxes,
) -> Queries:
    """Runs a kernel that the partitioner cannot cut up on each device's own rows and heads."""
    mesh = current_mesh()
    if mesh is None:
        return kernel(q, k, v, lengths)
    rows, heads, kv_heads = axes
    queries = logical_to_mesh_axes((rows, None, heads, None), q.shape, mesh)
    keys = logical_to_mesh_axes((rows, None, kv_heads, None), k.shape, mesh)
    sharded = jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(queries, keys, keys, PartitionSpec(queries[0])),
        out_specs=queries,
        check_vma=False,
    )
    return sharded(q, k, v, lengths)


def _cudnn(
    q: Queries, k: KeysValues, v: KeysValues, lengths: Int[Array, " B"] | None, *, causal: bool
) -> Queries:
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def splash_attention(
    q: Queries,
    k: KeysValues,
    v: KeysValues,
    lengths: Int[Array, " B"] | None = None,
    *,
    causal: bool,
    interpret: bool = False,
) -> Queries:
    """JAX's Pallas kernel for TPUs (FlashAttention, Dao 2023, that skips blocks the mask leaves empty).

    Args:
        q: queries of any length; padded here to whole blocks.
        k: keys.
        v: values.
        lengths: valid keys of each row; None when all are.
        causal: a token sees itself and those before it.
        interpret: run the kernel's program on any machine, slowly (tests).
    """
    rows, length, heads, head_dim = q.shape
    keys = k.shape[1]
    q_block, q_padded = splash_blocks(length)
    block, padded = splash_blocks(keys)
    mask = (splash.CausalMask if causal else splash.FullMask)((q_padded, padded))
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=q_block,
            block_kv=block,
            block_q_dkv=q_block,
            block_kv_dkv=block,
            block_q_dq=q_block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )

    def heads_first(x: Float[Array, "B S K H"], length: int) -> Float[Array, "B K padded H"]:
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))), 1, 2)

    operands = [
        heads_first(q * head_dim**-0.5, q_padded),
        heads_first(k, padded),
        heads_first(v, padded),
    ]
    if lengths is None and (causal or padded == keys):
        out = jax.vmap(kernel)(*operands)
    else:
        valid = jnp.full(rows, keys) if lengths is None else lengths
        # A query sees the keys of its segment. All queries are of the valid one, so that none sees nothing.
        segments = splash.SegmentIds(
            q=jnp.zeros((rows, q_padded), jnp.int32),
            kv=(jnp.arange(padded)[None] >= valid[:, None]).astype(jnp.int32),
        )
        out = jax.vmap(kernel)(*operands, segments)
    return jnp.swapaxes(out, 1, 2)[:, :length]


def splash_blocks(length: int) -> tuple[int, int]:
    """Block size and padded length: the least padding, then the largest block."""
    if length <= LANES:
        return LANES, LANES
    padded = {block: -(-length // block) * block for block in SPLASH_BLOCKS}
    block = min(padded, key=lambda block: (padded[block], -block))
    return block, padded[block]


# The language model's key and value memory: fixed shapes, each sample at its own length.


_WRITE = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3),
    inserted_window_dims=(0, 2),
    scatter_dims_to_operand_dims=(0, 2),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)
"""Slots (layer, place) of each sample's own row. `.at[layer, rows, slots]` says the same, but not to the
partitioner, which then sends every sample's new keys to all devices, in every block."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, allocated once (`LanguageModel.prefill`).

    Sample b holds `lengths[b]` tokens at the front of its row; what lies behind is never attended to.
    The caller sees to it that no sample outgrows the capacity: writes past the end are dropped.
    """

    keys: Float[Array, "L B capacity K H"]
    values: Float[Array, "L B capacity K H"]
    lengths: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        """Tokens that fit in one sample's row."""
        return self.keys.shape[2]

    def write(
        self, layer: Int[Array, ""], keys: Float[Array, "B S K H"], values: Float[Array, "B S K H"]
    ) -> KVCache:
        """Puts one layer's new keys and values behind each sample's tokens; lengths stay as they are."""
        slots = self.lengths[:, None] + jnp.arange(keys.shape[1])[None]
        at = jnp.stack([jnp.broadcast_to(layer, slots.shape), slots], axis=-1)

        def put(memory: Array, new: Array) -> Array:
            return jax.lax.scatter(memory, at, new.astype(memory.dtype), _WRITE, mode="drop")

        return dataclasses.replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def attention_mask(self, new_tokens: int) -> Bool[Array, "B 1 S capacity"]:
        """Which slots each of `new_tokens` coming tokens may see: its own and all before it."""
        last_visible = self.lengths[:, None] + jnp.arange(new_tokens)[None]
        return (jnp.arange(self.capacity)[None, None] <= last_visible[..., None])[:, None]

    def grown(self, new_tokens: Int[Array, " B"] | int) -> KVCache:
        """The cache with `new_tokens` more tokens counted in each sample."""
        return dataclasses.replace(self, lengths=self.lengths + new_tokens)

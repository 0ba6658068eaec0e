"""Qwen3-VL: vision tower with deepstack and language model as one module (dense models; Qwen team 2025)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spacedrive_jax.bounds import COUNT, FROM_ZERO, Bounds
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig
from spacedrive_jax.models.families.qwen2_5_vl import (
    MultimodalRope,
    QwenChat,
    QwenImageProcessor,
    QwenTokensConfig,
    QwenTowerConfig,
)
from spacedrive_jax.models.family import ChatML, Family
from spacedrive_jax.models.image_processor import HALVES, ProcessorSettings
from spacedrive_jax.models.layers import INIT_STD, LayerNorm, Projection, parameter, scan_layers, stack_layers
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.positions import mrope_positions, vision_rotary
from spacedrive_jax.models.vision_language import VisualFeatures
from spacedrive_jax.models.vision_transformer import (
    Projector,
    VisionBlock,
    check_patches,
    projector_flops,
    tanh_gelu,
    tower_flops,
    window_layout,
)


@dataclasses.dataclass(frozen=True)
class Qwen3VisionConfig(QwenTowerConfig):
    """The Qwen3-VL vision tower; the defaults are those of Qwen3-VL-8B."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    depth: int = 27
    num_heads: int = 16
    norm_eps: float = 1e-6
    patch_size: int = 16
    out_hidden_size: int = 4096
    num_position_embeddings: int = 2304
    """A square number: the learnt grid that is stretched over an image's patches."""
    deepstack_blocks: tuple[int, ...] = (8, 16, 24)
    """Blocks whose output goes to the language model too, the k-th behind its k-th block (Meng et al.
    2024)."""

    BOUNDS: ClassVar[Bounds] = {
        **QwenTowerConfig.BOUNDS,
        "deepstack_blocks": FROM_ZERO,
        "num_position_embeddings": COUNT,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_side**2 != self.num_position_embeddings:
            raise ConfigError(
                f"num_position_embeddings ({self.num_position_embeddings}) must be a square number"
            )
        blocks = self.deepstack_blocks
        if list(blocks) != sorted(set(blocks)) or any(block >= self.depth for block in blocks):
            raise ConfigError(f"deepstack_blocks {blocks} must rise within 0..{self.depth - 1}")

    @property
    def position_side(self) -> int:
        """Rows and columns of the learnt grid of positions."""
        return math.isqrt(self.num_position_embeddings)


def _decoder(width: int, inner: int, layers: int, heads: int, *, tied: bool) -> LanguageModelConfig:
    """What the released language models have in common."""
    return LanguageModelConfig(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        rope_theta=5_000_000.0,
        mrope_section=(24, 20, 20),
        mrope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
        tie_word_embeddings=tied,
    )


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig(QwenTokensConfig):
    """Qwen3-VL: vision tower, language model and the token ids that tie them together."""

    decoder: LanguageModelConfig = _decoder(4096, 12288, 36, 32, tied=False)
    vision: Qwen3VisionConfig = Qwen3VisionConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.vision.deepstack_blocks) > self.decoder.num_layers:
            raise ConfigError(
                f"{len(self.vision.deepstack_blocks)} deepstack_blocks do not fit {self.decoder.num_layers} "
                "blocks of the language model"
            )

    @classmethod
    def qwen3_vl_2b(cls) -> Qwen3VLConfig:
        """Dimensions of Qwen3-VL-2B."""
        return cls(decoder=_decoder(2048, 6144, 28, 16, tied=True), vision=_small_tower(2048))

    @classmethod
    def qwen3_vl_4b(cls) -> Qwen3VLConfig:
        """Dimensions of Qwen3-VL-4B."""
        return cls(decoder=_decoder(2560, 9728, 36, 32, tied=True), vision=_small_tower(2560))

    @classmethod
    def qwen3_vl_8b(cls) -> Qwen3VLConfig:
        """Dimensions of Qwen3-VL-8B."""
        return cls()


def _small_tower(out: int) -> Qwen3VisionConfig:
    """The tower of 2B and 4B."""
    return Qwen3VisionConfig(
        hidden_size=1024, intermediate_size=4096, depth=24, deepstack_blocks=(5, 11, 17), out_hidden_size=out
    )


# Patches to visual tokens: patch embedding, learnt positions stretched over the grid, blocks with 2-D rotary
# embedding and full attention, a merger of 2x2 patches into one token. The outputs of a few blocks go through
# mergers of their own.


def _merger(
    config: Qwen3VisionConfig, *, norm_merged: bool, compute: ComputeConfig, rngs: nnx.Rngs
) -> Projector:
    """Patches to tokens of the language model's width, with a norm before or after they are put together."""
    merged = config.merged_size
    normed = merged if norm_merged else config.hidden_size
    norm = LayerNorm(normed, config.norm_eps, name="vision_embed", compute=compute, rngs=rngs)
    return Projector(
        merged,
        merged,
        config.out_hidden_size,
        norm=norm,
        norm_merged=norm_merged,
        compute=compute,
        rngs=rngs,
    )


class Deepstack(nnx.Module):
    """The mergers of the blocks whose outputs the language model gets too, stacked."""

    def __init__(self, config: Qwen3VisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        self.compute = compute
        self.layers = stack_layers(
            lambda streams: _merger(config, norm_merged=True, compute=compute, rngs=streams),
            len(config.deepstack_blocks),
            rngs,
        )

    def __call__(self, taken: Float[Array, "K I P D"]) -> Float[Array, "K I V O"]:
        """Merges each block's output."""

        def apply(merger: Projector, carry: None, patches: Any) -> tuple[None, Any]:
            return carry, merger(patches)

        return scan_layers(self.layers, apply, None, taken, self.compute)[1]


class Qwen3Vision(nnx.Module):
    """The whole tower."""

    def __init__(self, config: Qwen3VisionConfig, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws a fresh tower.

        Args:
            config: architecture.
            compute: dtypes, rematerialisation, attention kernel.
            rngs: random streams (`params`).
        """
        self.config = config
        self.compute = compute
        width, outer = (config.hidden_size,), ("vision_embed",)
        self.patch_embedding = Projection(
            (config.patch_channels,), width, (None,), outer, bias=True, compute=compute, rngs=rngs
        )
        self.position_embedding = parameter(
            nnx.Param,
            jax.nn.initializers.normal(INIT_STD),
            (config.num_position_embeddings, *width),
            (None, *outer),
            dtype=compute.storage_dtype,
            rngs=rngs,
        )
        self.layers = stack_layers(
            lambda streams: VisionBlock(
                config, activation=tanh_gelu, fused_qkv=True, compute=compute, rngs=streams
            ),
            config.depth,
            rngs,
        )
        self.merger = _merger(config, norm_merged=False, compute=compute, rngs=rngs)
        has_deepstack = bool(config.deepstack_blocks)
        self.deepstack = Deepstack(config, compute=compute, rngs=rngs) if has_deepstack else None

    def __call__(self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]) -> VisualFeatures:
        """Encodes images of one size.

        Args:
            pixel_values: flattened patches as transformers' Qwen2-VL image processor lays them out:
                normalised channels x 2 equal frames x 16 x 16, patches of a 2x2 block next to each other.
            grid: patch rows and columns, the same for all images; static.

        Returns:
            Visual tokens in row-major order of the merged grid, in the language model's width, and what
            goes to deeper blocks.

        Raises:
            ConfigError: the pixels do not fit the grid or the grid does not divide into merged tokens.
        """
        config = self.config
        layout = window_layout(grid, config.merge_size, max(grid))  # one window: the processor's order
        check_patches(pixel_values, grid, config)
        rotary = vision_rotary(layout.rows, layout.columns, config.head_dim)
        hidden = self.patch_embedding(constrain(pixel_values, "images", None, None))
        positions = self._positions(layout.rows, layout.columns, grid)
        hidden = constrain(hidden + positions[None], "images", None, None)

        count = len(config.deepstack_blocks)
        # A block's output is kept in its own row; one that nobody asks for in the row behind them, so that
        # every block does the same and the buffer is updated in place.
        row_of_block = np.full(config.depth, count)
        row_of_block[list(config.deepstack_blocks)] = np.arange(count)
        kept = jnp.zeros((count + 1, *hidden.shape), hidden.dtype)

        def apply(block: VisionBlock, carry: Any, row: Any) -> tuple[Any, None]:
            hidden, kept = carry
            hidden = block(hidden, rotary)
            kept = jax.lax.dynamic_update_index_in_dim(kept, hidden, row, axis=0)
            return (hidden, constrain(kept, None, "images", None, None)), None

        if self.deepstack is None:
            hidden, _ = scan_layers(
                self.layers, lambda block, x, _: (block(x, rotary), None), hidden, None, self.compute
            )
            return VisualFeatures(self.merger(hidden))
        (hidden, kept), _ = scan_layers(
            self.layers, apply, (hidden, kept), jnp.asarray(row_of_block), self.compute
        )
        return VisualFeatures(self.merger(hidden), self.deepstack(kept[:count]))

    def _positions(
        self, rows: Int[np.ndarray, " P"], columns: Int[np.ndarray, " P"], grid: tuple[int, int]
    ) -> Float[Array, "P D"]:
        """The learnt grid, stretched so that its corners lie on the image's, read bilinearly."""
        side = self.config.position_side
        (near_row, row_share), (near_column, column_share) = (
            _neighbours(places, size, side) for places, size in zip((rows, columns), grid, strict=True)
        )
        index = (near_row[:, :, None] * side + near_column[:, None, :]).reshape(-1, 4)
        share = (row_share[:, :, None] * column_share[:, None, :]).reshape(-1, 4, 1)
        table = self.position_embedding[...].astype(jnp.float32)
        return (table[index] * share).sum(axis=1).astype(self.compute.activation_dtype)


def _neighbours(
    places: Int[np.ndarray, " P"], size: int, side: int
) -> tuple[Int[np.ndarray, "P 2"], Float[np.ndarray, "P 2"]]:
    """Along one axis: the two places of a grid of `side` around each of `size`, and their shares, float32."""
    exact = places.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    below = np.floor(exact)
    near = np.minimum(below.astype(np.int64)[:, None] + np.arange(2), side - 1)
    above = exact - below
    return near, np.stack([1 - above, above], axis=1)


class Qwen3VL(MultimodalRope):
    """The vision-language model; its vision tower hands over tokens of the language model's width, and
    deepstack.
    """

    config: Qwen3VLConfig

    def draw_vision(self, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        """Draws the tower."""
        self.vision = Qwen3Vision(self.config.vision, compute=compute, rngs=rngs)

    def encode_images(
        self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]
    ) -> Float[Array, "I V D"]:
        """Visual tokens alone; see `Qwen3Vision`."""
        return self.vision(pixel_values, grid).tokens

    def visual_features(self, pixel_values: Float[Array, "I P C"], grid: tuple[int, int]) -> VisualFeatures:
        """Visual tokens and deepstack; see `Qwen3Vision`."""
        return self.vision(pixel_values, grid)


class Qwen3Chat(QwenChat):
    """Qwen2.5-VL's layout without a system turn; labels likewise, there being no published SpaceDrive."""

    system = None
    ego_feature = ChatML.ego_feature  # Qwen2.5-VL's is as published


class Qwen3ImageProcessor(QwenImageProcessor):
    """Qwen2.5-VL's with other limits, and pixels from -1 to 1.

    Intrinsics count the pixels of the resized image, whose patches the tokens are.
    """

    mean = std = HALVES
    published = ProcessorSettings(
        mean=HALVES, std=HALVES, size=(("shortest_edge", 256 * 256), ("longest_edge", 4096 * 4096))
    )

    def __init__(
        self,
        vision: Qwen3VisionConfig,
        image_size: tuple[int, int],
        settings: ProcessorSettings | None = None,
    ) -> None:
        """See `QwenImageProcessor`."""
        super().__init__(vision, image_size, settings)
        self.intrinsics_size = self.resized


def vision_flops(config: Qwen3VLConfig, patch_grid: tuple[int, int]) -> int:
    """Operations of the tower's forward pass over one image, all mergers included."""
    vision = config.vision
    merged, tokens = vision.merged_size, patch_grid[0] * patch_grid[1] // vision.merge_size**2
    merger = projector_flops(tokens, merged, merged, vision.out_hidden_size)
    return tower_flops(vision, patch_grid) + (1 + len(vision.deepstack_blocks)) * merger


FAMILY = Family(
    name="qwen3_vl",
    config=Qwen3VLConfig,
    model=Qwen3VL,
    chat=Qwen3Chat(),
    image_processor=Qwen3ImageProcessor,
    position_ids=mrope_positions,
    vision_flops=vision_flops,
    interop="spacedrive_jax.interop.qwen3_vl",
)

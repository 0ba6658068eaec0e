"""What a vision-language model is made of, as frozen, hashable values.

`DecoderConfig` describes the language decoder alone and covers Qwen2.5 (biases, grouped heads,
multimodal rotary embedding) and LLaMA (no biases, one-dimensional rotary embedding) alike.
Reading and writing transformers' config.json lives in `hf_config.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from spacedrive_jax.bounds import (
    COUNT,
    FROM_ZERO,
    POSITIVE,
    SHARE_BELOW_ONE,
    SIDE,
    Bound,
    Bounds,
    check_bounds,
)
from spacedrive_jax.errors import ConfigError

LoraTarget = Literal["q", "k", "v", "o"]
RematPolicy = Literal["none", "full", "dots", "dots_no_batch"]
BaseQuantization = Literal["none", "int8", "int4"]
AttentionChoice = Literal["auto", "xla", "cudnn", "splash"]

_REMAT_POLICIES = {
    "full": "nothing_saveable",
    "dots": "dots_saveable",
    "dots_no_batch": "dots_with_no_batch_dims_saveable",
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A causal language decoder with pre-norm blocks, grouped-query attention and SwiGLU.

    The defaults are those of Qwen2.5-VL-7B.
    """

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128
    rope_theta: float = 1_000_000.0
    rope_sections: tuple[int, ...] = (16, 24, 24)
    """How many rotary frequencies turn with each position axis (time, row, column). One section is the
    ordinary one-dimensional embedding, which then follows the first axis only."""
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    tied_head: bool = False
    """The head is the embedding table."""

    BOUNDS: ClassVar[Bounds] = {
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_layers"), COUNT),
        **dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "rope_sections"), COUNT),
        "rope_theta": POSITIVE,
        "norm_eps": POSITIVE,
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.vlm.decoder")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if 2 * sum(self.rope_sections) != self.head_dim or not 1 <= len(self.rope_sections) <= 3:
            raise ConfigError(
                f"rope_sections {self.rope_sections} must be one to three numbers that sum to half of "
                f"head_dim ({self.head_dim})"
            )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What every vision tower has."""

    hidden_size: int
    intermediate_size: int
    depth: int
    num_heads: int
    norm_eps: float
    patch_size: int = 14
    in_channels: int = 3

    BOUNDS: ClassVar[Bounds] = {
        **dict.fromkeys(("hidden_size", "intermediate_size", "depth", "num_heads"), COUNT),
        **dict.fromkeys(("patch_size", "in_channels"), COUNT),
        "norm_eps": POSITIVE,
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.vlm.vision")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"vision hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig(VisionConfig):
    """The Qwen2.5-VL vision tower: windowed attention in most blocks, full attention in a few."""

    hidden_size: int = 1280
    intermediate_size: int = 3420
    depth: int = 32
    num_heads: int = 16
    norm_eps: float = 1e-6
    full_attention_blocks: tuple[int, ...] = (7, 15, 23, 31)
    window_size: int = 112
    """Side of an attention window in pixels."""
    temporal_patch_size: int = 2
    merge_size: int = 2
    """merge_size x merge_size patches become one visual token."""
    out_hidden_size: int = 3584

    BOUNDS: ClassVar[Bounds] = {
        **VisionConfig.BOUNDS,
        "full_attention_blocks": FROM_ZERO,
        **dict.fromkeys(("window_size", "temporal_patch_size", "merge_size", "out_hidden_size"), COUNT),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 4:
            raise ConfigError(
                f"vision hidden_size ({self.hidden_size}) over num_heads ({self.num_heads}) must be a "
                "multiple of 4: the rotary embedding has two axes"
            )
        if any(not 0 <= block < self.depth for block in self.full_attention_blocks):
            raise ConfigError(
                f"full_attention_blocks {self.full_attention_blocks} must lie in 0..{self.depth - 1}"
            )
        if self.window_tokens < 1:
            raise ConfigError(
                f"window_size {self.window_size} holds no token of {self.patch_size * self.merge_size} pixels"
            )

    @property
    def patch_channels(self) -> int:
        """Length of one flattened patch as the image processor hands it over."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_tokens(self) -> int:
        """Side of an attention window in merged tokens."""
        return self.window_size // self.merge_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """Qwen2.5-VL: vision tower, decoder and the token ids that tie them together."""

    decoder: DecoderConfig = DecoderConfig()
    vision: QwenVisionConfig = QwenVisionConfig()
    image_token_id: int = 151655
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    BOUNDS: ClassVar[Bounds] = dict.fromkeys(
        ("image_token_id", "vision_start_token_id", "vision_end_token_id"), FROM_ZERO
    )

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.vlm")
        if self.vision.out_hidden_size != self.decoder.hidden_size:
            raise ConfigError(
                f"vision.out_hidden_size ({self.vision.out_hidden_size}) must equal decoder.hidden_size "
                f"({self.decoder.hidden_size})"
            )

    @classmethod
    def qwen2_5_vl_3b(cls) -> QwenVLConfig:
        """Dimensions of Qwen2.5-VL-3B."""
        return cls(
            decoder=DecoderConfig(
                vocab_size=151936,
                hidden_size=2048,
                intermediate_size=11008,
                num_layers=36,
                num_heads=16,
                num_kv_heads=2,
                tied_head=True,
            ),
            vision=QwenVisionConfig(out_hidden_size=2048),
        )

    @classmethod
    def qwen2_5_vl_7b(cls) -> QwenVLConfig:
        """Dimensions of Qwen2.5-VL-7B."""
        return cls()


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(VisionConfig):
    """The CLIP vision transformer (Radford et al. 2021), as LLaVA uses it; the defaults are ViT-L/14-336."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    depth: int = 24
    num_heads: int = 16
    norm_eps: float = 1e-5
    image_size: int = 336
    """Side of the square images in pixels; the position embedding is learnt for this size alone."""
    feature_layer: int = -2
    """Which hidden state is handed on, counted from the end: -1 is the last block's output."""

    BOUNDS: ClassVar[Bounds] = {**VisionConfig.BOUNDS, "image_size": SIDE, "feature_layer": Bound(most=-1)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})"
            )
        if not -self.depth - 1 <= self.feature_layer <= -1:
            raise ConfigError(f"feature_layer {self.feature_layer} must lie in -{self.depth + 1}..-1")

    @property
    def patch_channels(self) -> int:
        """Length of one flattened patch, channels x rows x columns."""
        return self.in_channels * self.patch_size**2

    @property
    def grid_side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def merge_size(self) -> int:
        """Every patch is a visual token of its own."""
        return 1

    @property
    def used_blocks(self) -> int:
        """Blocks that run; those behind are kept for the checkpoint's sake only."""
        return self.depth + 1 + self.feature_layer


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """LLaVA-1.5 (Liu et al. 2024): CLIP, a two-layer projector and a LLaMA decoder.

    The defaults are those of LLaVA-1.5-7B.
    """

    decoder: DecoderConfig = DecoderConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        rope_theta=10_000.0,
        rope_sections=(64,),
        norm_eps=1e-5,
        qkv_bias=False,
    )
    vision: ClipVisionConfig = ClipVisionConfig()
    image_token_id: int = 32000
    projector_bias: bool = True

    BOUNDS: ClassVar[Bounds] = {"image_token_id": FROM_ZERO}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.vlm")
        if len(self.decoder.rope_sections) != 1 or self.decoder.qkv_bias:
            raise ConfigError(
                "LLaVA's decoder has one-dimensional rotary positions and no attention biases; got "
                f"rope_sections {self.decoder.rope_sections}, qkv_bias {self.decoder.qkv_bias}"
            )

    @classmethod
    def llava_1_5_7b(cls) -> LlavaConfig:
        """Dimensions of LLaVA-1.5-7B."""
        return cls()


VLConfig = QwenVLConfig | LlavaConfig
"""Any of the vision-language models here."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the decoder's attention projections (Hu et al. 2021).

    The defaults are SpaceDrive's for Qwen2.5-VL.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[LoraTarget, ...] = ("q", "k", "v", "o")

    BOUNDS: ClassVar[Bounds] = {"rank": COUNT, "alpha": POSITIVE, "dropout": SHARE_BELOW_ONE}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.lora")

    @property
    def scaling(self) -> float:
        """Factor on the adapter's output, alpha over rank."""
        return self.alpha / self.rank

    @classmethod
    def llava_1_5(cls, rank: int = 16) -> LoraConfig:
        """SpaceDrive's adapters for LLaVA-1.5: k, v, o, always with scaling 1."""
        return cls(rank=rank, alpha=float(rank), targets=("k", "v", "o"))


@dataclasses.dataclass(frozen=True)
class NewTokensConfig:
    """Vocabulary ids whose embedding and head rows are small trainable tables of their own."""

    first_id: int
    count: int = 2


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model computes; none of it changes what a checkpoint holds but `param_dtype`."""

    dtype: str = "float32"
    """Activations and matrix products. Norms, softmax, rotary angles and logits are float32 always."""
    param_dtype: str = "float32"
    """Storage of the base weights. Adapters and new-token rows are float32 always."""
    base_quantization: BaseQuantization = "none"
    """Storage of the frozen base's projections, in decoder and vision tower: as `param_dtype` says, in
    eight bits with a scale for every output channel, or in four with one for every 64 weights
    (`quantization`). Embedding, head, norms and biases stay in `param_dtype`."""
    remat: RematPolicy = "none"
    """What a block keeps for the backward pass: everything, nothing, or its matrix products."""
    attention: AttentionChoice = "auto"
    """Kernel of attention over whole sequences: plain `xla`, the fused `cudnn` (NVIDIA GPUs, half precision)
    or `splash` (TPUs). `auto` takes the fused one where there is one (`attention.choose_kernel`)."""

    @property
    def activation_dtype(self) -> jnp.dtype:
        """`dtype` as jax knows it."""
        return jnp.dtype(self.dtype)

    @property
    def storage_dtype(self) -> jnp.dtype:
        """`param_dtype` as jax knows it."""
        return jnp.dtype(self.param_dtype)

    @property
    def weight_bits(self) -> int:
        """Bits that one weight of the base's projections is stored in, its share of a scale left out."""
        return {"none": 8 * self.storage_dtype.itemsize, "int8": 8, "int4": 4}[self.base_quantization]

    def remat_policy(self) -> Callable[..., bool] | None:
        """The `jax.checkpoint` policy that `remat` names; None where nothing is recomputed."""
        if self.remat == "none":
            return None
        return getattr(jax.checkpoint_policies, _REMAT_POLICIES[self.remat])

"""What a vision-language model is made of, as frozen, hashable values.

`LanguageModelConfig` describes the language model alone and covers Qwen2.5 (biases, grouped heads,
multimodal rotary embedding), Qwen3 (normed queries and keys) and LLaMA (no biases, one-dimensional rotary
embedding) alike.
Reading and writing transformers' config.json is the business of `interop/`.
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
    Bounds,
    check_bounds,
)
from spacedrive_jax.errors import ConfigError

LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]
RematPolicy = Literal["none", "full", "attention", "attention_mlp", "dots", "dots_no_batch"]
BaseQuantization = Literal["none", "int8", "int4"]
AttentionChoice = Literal["auto", "xla", "cudnn", "splash"]

KEPT_BY_ATTENTION = ("query", "key", "value", "attended", "residual")
"""What `language_model` names of one of its blocks, and remat `attention` keeps. With a frozen base the
backward pass needs little else: the gate and up products and norms, which are worked out again."""
KEPT_BY_ATTENTION_MLP = (*KEPT_BY_ATTENTION, "gate", "up")
"""What remat `attention_mlp` keeps: of the wide products nothing is worked out again."""
_REMAT_POLICIES = {
    "full": "nothing_saveable",
    "dots": "dots_saveable",
    "dots_no_batch": "dots_with_no_batch_dims_saveable",
}


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """The language model: a causal decoder with pre-norm blocks, grouped-query attention and SwiGLU.

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
    mrope_section: tuple[int, ...] = (16, 24, 24)
    """How many rotary frequencies turn with each position axis (time, row, column). One section is the
    ordinary one-dimensional embedding, which then follows the first axis only."""
    mrope_interleaved: bool = False
    """Frequencies take turns among the axes (Qwen3-VL) instead of lying in runs: time, row, column, time, …;
    row and column take as many as their sections say, time the rest."""
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    """Queries and keys are RMS-normed, head by head, before they are turned (Qwen3)."""
    tie_word_embeddings: bool = False
    """The head is the embedding table."""
    max_position_embeddings: int | None = None
    """Positions up to which the rotary angles are as trained, where they are scaled behind them (InternVL3);
    longer sequences are refused. None where nothing scales them."""
    dynamic_rope_factor: float = 1.0
    """By what: transformers' `dynamic` scaling, which is kept for exports and does nothing before."""

    BOUNDS: ClassVar[Bounds] = {
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_layers"), COUNT),
        **dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "mrope_section"), COUNT),
        "rope_theta": POSITIVE,
        "norm_eps": POSITIVE,
        "max_position_embeddings": COUNT,
        "dynamic_rope_factor": POSITIVE,
    }

    def check_length(self, length: int, what: str) -> None:
        """Refuses sequences behind the positions that the rotary angles hold for.

        Args:
            length: positions, those of the answer among them.
            what: what is so long.

        Raises:
            ConfigError: naming both numbers.
        """
        if self.max_position_embeddings is not None and length > self.max_position_embeddings:
            raise ConfigError(
                f"{what} of {length} positions: behind max_position_embeddings "
                f"{self.max_position_embeddings} this model scales its rotary angles (dynamic RoPE), which "
                "is not done here; make it shorter"
            )

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.vlm.decoder")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.mrope_interleaved and (len(self.mrope_section) != 3 or self.head_dim % 2):
            raise ConfigError(
                f"mrope_interleaved needs three sections, got {self.mrope_section}, and an even head_dim, "
                f"got {self.head_dim}"
            )
        if self.mrope_interleaved:
            return
        if 2 * sum(self.mrope_section) != self.head_dim or not 1 <= len(self.mrope_section) <= 3:
            raise ConfigError(
                f"mrope_section {self.mrope_section} must be one to three numbers that sum to half of "
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
    merge_size: int = 1
    """merge_size x merge_size patches become one visual token."""

    BOUNDS: ClassVar[Bounds] = {
        **dict.fromkeys(("hidden_size", "intermediate_size", "depth", "num_heads"), COUNT),
        **dict.fromkeys(("patch_size", "in_channels", "merge_size"), COUNT),
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

    @property
    def patch_channels(self) -> int:
        """K: length of one flattened patch as the image processor hands it over."""
        return self.in_channels * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class SquareVisionConfig(VisionConfig):
    """A tower whose images are squares of one size, for which its position embedding is learnt."""

    image_size: int = 224
    """Side of the square images in pixels; the position embedding is learnt for this size alone."""

    BOUNDS: ClassVar[Bounds] = {**VisionConfig.BOUNDS, "image_size": SIDE}
    leaves_border: ClassVar[bool] = False
    """What `patch_size` leaves over at an image's right and bottom is not seen, rather than refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % (self.patch_size * self.merge_size) and not self.leaves_border:
            raise ConfigError(
                f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size}) times "
                f"merge_size ({self.merge_size})"
            )
        if self.grid_side < 1 or self.grid_side % self.merge_size:
            raise ConfigError(
                f"image_size {self.image_size} gives {self.grid_side} patches of {self.patch_size} pixels a "
                f"side, which must be a multiple of merge_size ({self.merge_size})"
            )

    @property
    def grid_side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class VLConfig:
    """A vision-language model; each family derives its own, with its defaults (`models.families`)."""

    decoder: LanguageModelConfig
    """The language model."""
    vision: VisionConfig
    """The vision tower."""
    image_token_id: int

    BOUNDS: ClassVar[Bounds] = {"image_token_id": FROM_ZERO}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.vlm")

    def expect_plain_decoder(self, name: str, *, qkv_bias: bool) -> None:
        """Refuses a language model that is none of LLaMA's (or with biases, Qwen2's) make.

        Args:
            name: of the family, for the message.
            qkv_bias: whether its queries, keys and values have biases.

        Raises:
            ConfigError: it has rotary positions on several axes, or biases where it must have none.
        """
        if len(self.decoder.mrope_section) != 1 or self.decoder.qkv_bias != qkv_bias:
            raise ConfigError(
                f"{name}'s language model (model.vlm.decoder) has one-dimensional rotary positions and "
                f"{'' if qkv_bias else 'no '}attention biases; got mrope_section "
                f"{self.decoder.mrope_section}, qkv_bias {self.decoder.qkv_bias}"
            )


Ids = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """What a checkpoint's files say of ids beside the architecture: no number depends on it."""

    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer: all of generation_config.json, else those of config.json."""
    named: tuple[tuple[str, Ids], ...] = ()
    """Other fields of the language model's config, kept for an export: `bos_token_id` and the like."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on projections of the language model's attention and MLP (Hu et al. 2021).

    The defaults are SpaceDrive's for Qwen2.5-VL.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[LoraTarget, ...] = ("q", "k", "v", "o")

    BOUNDS: ClassVar[Bounds] = {"rank": COUNT, "alpha": POSITIVE, "dropout": SHARE_BELOW_ONE}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "model.lora")

    def on(self, target: str) -> LoraConfig | None:
        """The adapters of one projection; None where it has none."""
        return self if target in self.targets else None

    @property
    def scaling(self) -> float:
        """Factor on the adapter's output, alpha over rank."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class NewTokensConfig:
    """Vocabulary ids whose embedding and head rows are small trainable tables of their own."""

    first_id: int
    count: int = 2


FLOATS = ("float32", "bfloat16", "float16")
"""Types to compute and to store in."""


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model computes; none of it changes what a checkpoint holds but `param_dtype`."""

    dtype: str = "float32"
    """Activations and matrix products. Norms, softmax, rotary angles and logits are float32 always. `float16`
    is for inference: training, which does not scale its loss, refuses it."""
    param_dtype: str = "float32"
    """Storage of the base weights. Adapters and new-token rows are float32 always."""
    init: Literal["fixed", "fan_in"] = "fixed"
    """How base weights that no checkpoint gives are drawn: with a deviation of 0.02 whatever their shape
    (transformers' `initializer_range`, made for widths of thousands), or of 1 / sqrt(inputs), which keeps
    signals their size: a small model drawn the first way hardly learns in its first hundreds of steps."""
    base_quantization: BaseQuantization = "none"
    """Storage of the frozen base's projections, in language model and vision tower: as `param_dtype` says, in
    eight bits with a scale for every output channel, or in four with one for every 64 weights
    (`quantization`). Embedding, head, norms and biases stay in `param_dtype`."""
    remat: RematPolicy = "none"
    """What a block keeps for the backward pass: everything (`none`), nothing (`full`), queries, keys, values,
    attention's output and the residual stream behind it (`attention`), those and the MLP's gate and up
    products (`attention_mlp`), or all matrix products, the adapters' in float32 too (`dots`,
    `dots_no_batch`)."""
    attention: AttentionChoice = "auto"
    """Kernel of attention over whole sequences: plain `xla`, the fused `cudnn` (NVIDIA GPUs, half precision)
    or `splash` (TPUs). `auto` takes the fused one where there is one (`attention.choose_kernel`)."""

    def __post_init__(self) -> None:
        for name, value in (("dtype", self.dtype), ("param_dtype", self.param_dtype)):
            if value not in FLOATS:
                raise ConfigError(f"model.compute.{name} {value!r} must be one of {', '.join(FLOATS)}")
        check_bounds(self, {}, "model.compute")

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
        if self.remat == "attention":
            return jax.checkpoint_policies.save_only_these_names(*KEPT_BY_ATTENTION)
        if self.remat == "attention_mlp":
            return jax.checkpoint_policies.save_only_these_names(*KEPT_BY_ATTENTION_MLP)
        return getattr(jax.checkpoint_policies, _REMAT_POLICIES[self.remat])

"""UniDepthV2's camera head and depth decoder (Piccinelli et al. 2025, section 3)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from spacedrive_jax.models.attention import IMAGE_AXES, attend
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.depth.backbone import PatchUpsample, bilinear, convolution, layer_norm, linear
from spacedrive_jax.models.layers import layer_scaled, scan_layers, stack_layers

NORM_EPS = 1e-5
LEAK = 0.01
"""Slope of the leaky ReLUs."""
FOCAL_PRIOR = 0.7
"""A zero prediction means this focal length, as a fraction of the image diagonal."""
LOG_BOUND = 8.0
LOG_RADIUS_OFFSET = 2.0
"""radius = exp(clip(output) + 2): a zero output means 7.4 m."""


class NormMlp(nnx.Module):
    """Norm, linear, exact GELU, linear; without a residual."""

    def __init__(self, width: int, hidden: int, out: int, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        self.norm = layer_norm(width, NORM_EPS, compute=compute, rngs=rngs)
        self.inner = linear(width, hidden, compute=compute, rngs=rngs)
        self.outer = linear(hidden, out, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """Applies the layers to each vector."""
        return self.outer(jax.nn.gelu(self.inner(self.norm(x)), approximate=False))


class CrossAttentionBlock(nnx.Module):
    """Attention to a context, then an MLP; both residual. Queries and context have norms of their own."""

    def __init__(
        self,
        width: int,
        heads: int,
        expansion: int,
        *,
        layer_scale: bool,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
    ) -> None:
        norm = functools.partial(layer_norm, width, NORM_EPS, compute=compute, rngs=rngs)
        make = functools.partial(linear, width, compute=compute, rngs=rngs, bias=False)
        self.query_norm, self.context_norm = norm(), norm()
        self.q, self.kv, self.out = make(width), make(2 * width), make(width)
        self.mlp = NormMlp(width, expansion * width, width, compute=compute, rngs=rngs)
        ones = functools.partial(jnp.ones, width, compute.storage_dtype)
        self.attention_scale = nnx.Param(ones()) if layer_scale else None
        self.mlp_scale = nnx.Param(ones()) if layer_scale else None
        self.heads = heads
        self.attention_choice = compute.attention

    def __call__(
        self,
        x: Float[Array, "B P D"],
        context: Float[Array, "B Q D"],
        query_position: Float[Array, "B P D"] | Float[Array, "P D"] | None = None,
    ) -> Float[Array, "B P D"]:
        """Runs the block; `query_position` is added to the projected queries, not to the keys."""
        q = self.q(self.query_norm(x))
        if query_position is not None:
            q = q + query_position.astype(q.dtype)
        k, v = jnp.split(self.kv(self.context_norm(context)), 2, axis=-1)
        q, k, v = (each.reshape(*each.shape[:2], self.heads, -1) for each in (q, k, v))
        attended = attend(q, k, v, choice=self.attention_choice, axes=IMAGE_AXES)
        x = x + layer_scaled(self.out(attended.reshape(x.shape)), self.attention_scale)
        return x + layer_scaled(self.mlp(x), self.mlp_scale)


class CameraHead(nnx.Module):
    """Pinhole intrinsics from the class tokens of the four taps."""

    def __init__(
        self, width: int, heads: int, expansion: int, *, compute: ComputeConfig, rngs: nnx.Rngs
    ) -> None:
        self.project = NormMlp(width, width, width, compute=compute, rngs=rngs)
        self.query_position = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (4, width), compute.storage_dtype)
        )
        block = functools.partial(
            CrossAttentionBlock, width, heads, expansion, layer_scale=True, compute=compute, rngs=rngs
        )
        self.first, self.second = block(), block()
        self.out = NormMlp(width, width, 1, compute=compute, rngs=rngs)

    def __call__(self, tokens: Float[Array, "B 4 D"]) -> Float[Array, "B 4"]:
        """Adapted class tokens to the four raw camera numbers."""
        x = self.project(tokens)
        position = self.query_position[...]
        for block in (self.first, self.second):
            x = block(x, x, position)
        return self.out(x)[..., 0].astype(jnp.float32)


def camera_parameters(raw: Float[Array, "B 4"], size: tuple[int, int]) -> Float[Array, "B 4"]:
    """The camera head's numbers to (fx, fy, cx, cy), pixels of an image of `size` (height, width)."""
    height, width = size
    diagonal = (height**2 + width**2) ** 0.5
    focal = FOCAL_PRIOR * diagonal * jnp.exp(raw[:, :2])
    centre = jax.nn.sigmoid(raw[:, 2:]) * jnp.array([width, height], jnp.float32)
    return jnp.concatenate([focal, centre], axis=-1)


class ResidualUnit(nnx.Module):
    """x + gamma * conv(lrelu(conv(lrelu(x))))."""

    def __init__(self, channels: int, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        self.first = convolution(channels, channels, 3, compute=compute, rngs=rngs)
        self.second = convolution(channels, channels, 3, compute=compute, rngs=rngs)
        self.gamma = nnx.Param(jnp.ones(channels, compute.storage_dtype))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Runs the unit."""
        inner = self.first(jax.nn.leaky_relu(x, LEAK))
        inner = self.second(jax.nn.leaky_relu(inner, LEAK))
        return x + self.gamma[...].astype(x.dtype) * inner


class UpStage(nnx.Module):
    """Residual units, a 1x1 convolution, then twice the size."""

    def __init__(
        self, channels: int, out_channels: int, units: int, *, compute: ComputeConfig, rngs: nnx.Rngs
    ) -> None:
        self.units = stack_layers(
            lambda streams: ResidualUnit(channels, compute=compute, rngs=streams), units, rngs
        )
        self.out = convolution(channels, out_channels, 1, compute=compute, rngs=rngs)
        self.compute = compute

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w E"]:
        """Runs the stage."""

        def apply(unit: ResidualUnit, carry: Any, _: Any) -> tuple[Any, None]:
            return unit(carry), None

        x, _ = scan_layers(self.units, apply, x, None, self.compute, unroll=True)
        x = self.out(x)
        return bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))


class OutputHead(nnx.Module):
    """The last features to one number per pixel of the network's input."""

    def __init__(self, channels: int, hidden: int, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        make = functools.partial(convolution, compute=compute, rngs=rngs)
        self.norm = layer_norm(channels, NORM_EPS, compute=compute, rngs=rngs)
        self.mix = linear(channels, channels, compute=compute, rngs=rngs)
        self.low = make(channels, channels // 2, 3, padding="REFLECT")
        self.high = make(channels // 2, hidden, 3, padding="REFLECT")
        self.out = make(hidden, 1, 1)

    def __call__(self, x: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B H W"]:
        """Raw logarithm of radius or confidence, float32."""
        low = self.low(self.mix(self.norm(x)))
        high = self.high(bilinear(low, size, "corners"))
        return self.out(jax.nn.leaky_relu(high, LEAK))[..., 0].astype(jnp.float32)


class DecodedDepth(NamedTuple):
    """What the depth decoder gives, at the network's size."""

    log_radius: Float[Array, "B H W"]
    log_confidence: Float[Array, "B H W"]
    latents: Float[Array, "B h w D"]
    """On the patch grid; the published code's `depth_features`."""


class DepthDecoder(nnx.Module):
    """Features of the four taps, conditioned on the rays, to radius and confidence."""

    def __init__(
        self,
        width: int,
        heads: int,
        expansion: int,
        units: tuple[int, ...],
        *,
        head_hidden: int,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
    ) -> None:
        make = functools.partial(CrossAttentionBlock, width, heads, expansion, layer_scale=False)
        self.prompts = stack_layers(lambda streams: make(compute=compute, rngs=streams), 4, rngs)
        self.to_latents = linear(width, width, compute=compute, rngs=rngs)
        channels = (width, width, width // 2, width // 4)
        self.inject = nnx.List(
            PatchUpsample(width, channels[stage], 2**stage, compute=compute, rngs=rngs) for stage in range(3)
        )
        self.stages = nnx.List(
            UpStage(channels[stage], channels[stage + 1], units[stage], compute=compute, rngs=rngs)
            for stage in range(3)
        )
        self.depth_head = OutputHead(channels[-1], head_hidden, compute=compute, rngs=rngs)
        self.confidence_head = OutputHead(channels[-1], head_hidden, compute=compute, rngs=rngs)
        self.compute = compute

    def condition(
        self, features: Float[Array, "4 B h w D"], rays: Float[Array, "B P D"]
    ) -> Float[Array, "4 B h w D"]:
        """Prompts every tap's features with the embedding of all rays."""
        rays = rays.astype(self.compute.activation_dtype)

        def apply(block: CrossAttentionBlock, carry: None, level: Any) -> tuple[None, Any]:
            return None, block(level.reshape(*level.shape[:1], -1, level.shape[-1]), rays)

        _, conditioned = scan_layers(self.prompts, apply, None, features, self.compute)
        return conditioned.reshape(features.shape)

    def __call__(
        self, features: Float[Array, "4 B h w D"], rays: Float[Array, "B P D"], size: tuple[int, int]
    ) -> DecodedDepth:
        """Decodes.

        Args:
            features: adapted patch features of the four taps.
            rays: embedding of the rays on the patch grid.
            size: height and width of the network's input.
        """
        conditioned = self.condition(features, rays)
        latents = self.to_latents(conditioned[0])
        x = latents
        for stage, inject, level in zip(self.stages, self.inject, conditioned[1:], strict=True):
            x = stage(x + inject(level))
        return DecodedDepth(self.depth_head(x, size), self.confidence_head(x, size), latents)

"""Depth Anything V2, metric (Yang et al. 2024): DINOv2 with a DPT decoder (Ranftl et al. 2021)."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from spacedrive_jax.bounds import POSITIVE, SIDE, Bounds, check_bounds
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.depth.backbone import (
    IMAGE_MEAN,
    IMAGE_STD,
    DepthPrediction,
    Dinov2,
    Dinov2Config,
    PatchUpsample,
    bilinear,
    convolution,
)

NUM_LEVELS = 4


@dataclasses.dataclass(frozen=True)
class DepthAnythingConfig:
    """Architecture and input size. The defaults are Metric-Outdoor-Small's."""

    encoder: Dinov2Config = Dinov2Config()  # noqa: RUF009  (frozen)
    neck_widths: tuple[int, ...] = (48, 96, 192, 384)
    fusion_width: int = 64
    head_hidden: int = 32
    max_depth: float = 80.0
    """The sigmoid's one, metres: 80 outdoors, 20 indoors."""
    input_side: int = 518
    """Images are scaled so that the side closer to this one meets it."""
    image_sized_output: bool = True
    """Resize the depth to the images; SpaceDrive pools it at the network's size."""

    BOUNDS: ClassVar[Bounds] = {
        "neck_widths": SIDE,
        "fusion_width": SIDE,
        "head_hidden": SIDE,
        "max_depth": POSITIVE,
        "input_side": SIDE,
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS)
        if len(self.encoder.taps) != NUM_LEVELS or len(self.neck_widths) != NUM_LEVELS:
            raise ConfigError(
                f"Depth Anything reads {NUM_LEVELS} taps: {self.encoder.taps} with widths {self.neck_widths}"
            )

    def network_size(self, image: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the network's input for images of (height, width), pixels.

        The rule of transformers' DPT processor: one scale for both sides, the one that changes the image
        less, then each side rounded to a multiple of the patch size (to even at a half, as Python rounds).

        Raises:
            ConfigError: a side is rounded to nothing.
        """
        by_height, by_width = (self.input_side / side for side in image)
        scale = by_width if abs(1 - by_width) < abs(1 - by_height) else by_height
        patch = self.encoder.patch_size
        rows, columns = (round(side * scale / patch) * patch for side in image)
        if min(rows, columns) < patch:
            raise ConfigError(
                f"images of {image[0]}x{image[1]} pixels reach the network as {rows}x{columns}, less than a "
                f"patch of {patch}: give images that are less narrow"
            )
        return rows, columns


class Reassemble(nnx.Module):
    """One tap's patch features to a map of its level's width and scale (4, 2, 1, 1/2 of the patch grid)."""

    def __init__(
        self, level: int, in_width: int, width: int, *, compute: ComputeConfig, rngs: nnx.Rngs
    ) -> None:
        self.project = convolution(in_width, width, 1, compute=compute, rngs=rngs)
        self.resize: PatchUpsample | nnx.Conv | None
        if level < 2:
            self.resize = PatchUpsample(width, width, 4 >> level, compute=compute, rngs=rngs)
        elif level == 2:
            self.resize = None
        else:
            self.resize = convolution(
                width, width, 3, compute=compute, rngs=rngs, padding=((1, 1), (1, 1)), stride=2
            )

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B i j E"]:
        """Projects and resizes."""
        x = self.project(x)
        return x if self.resize is None else self.resize(x)


class PreActivationUnit(nnx.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, width: int, *, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        self.first = convolution(width, width, 3, compute=compute, rngs=rngs)
        self.second = convolution(width, width, 3, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Runs the unit."""
        return x + self.second(jax.nn.relu(self.first(jax.nn.relu(x))))


class Fusion(nnx.Module):
    """Adds a level's features to what comes from the deeper ones, and scales up to the next level."""

    def __init__(self, width: int, *, deepest: bool, compute: ComputeConfig, rngs: nnx.Rngs) -> None:
        unit = functools.partial(PreActivationUnit, width, compute=compute, rngs=rngs)
        self.skip = None if deepest else unit()
        self.unit = unit()
        self.project = convolution(width, width, 1, compute=compute, rngs=rngs)

    def __call__(
        self, deeper: Float[Array, "B H W C"] | None, level: Float[Array, "B H W C"], size: tuple[int, int]
    ) -> Float[Array, "B h w C"]:
        """Fuses and resizes to `size`."""
        x = level
        if deeper is not None and self.skip is not None:
            x = deeper + self.skip(level)
        return self.project(bilinear(self.unit(x), size, "corners"))


class DepthAnything(nnx.Module):
    """The network, without confidence or camera; traceable by jax.jit."""

    def __init__(
        self, config: DepthAnythingConfig, *, compute: ComputeConfig | None = None, rngs: nnx.Rngs
    ) -> None:
        """Draws a fresh network.

        Args:
            config: architecture and input size.
            compute: dtypes, rematerialisation, attention kernel; float32 by default.
            rngs: random streams (`params`).
        """
        compute = compute or ComputeConfig()
        self.config = config
        self.encoder = Dinov2(config.encoder, compute=compute, rngs=rngs)
        make = functools.partial(convolution, compute=compute, rngs=rngs)
        width = config.fusion_width
        self.reassemble = nnx.List(
            Reassemble(level, config.encoder.width, each, compute=compute, rngs=rngs)
            for level, each in enumerate(config.neck_widths)
        )
        self.narrow = nnx.List(make(each, width, 3, bias=False) for each in config.neck_widths)
        self.fusion = nnx.List(
            Fusion(width, deepest=index == 0, compute=compute, rngs=rngs) for index in range(NUM_LEVELS)
        )
        """Deepest level first."""
        self.head_low = make(width, width // 2, 3)
        self.head_high = make(width // 2, config.head_hidden, 3)
        self.head_out = make(config.head_hidden, 1, 1)

    def network(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W"]:
        """Normalised images, sides a multiple of the patch size, to depth in metres, float32."""
        features, _ = self.encoder(images)
        levels = [
            narrow(reassemble(tap))
            for narrow, reassemble, tap in zip(self.narrow, self.reassemble, features, strict=True)
        ]
        x = None
        for index, (fusion, level) in enumerate(zip(self.fusion, levels[::-1], strict=True)):
            last = index == NUM_LEVELS - 1
            after = (2 * level.shape[1], 2 * level.shape[2]) if last else levels[-index - 2].shape[1:3]
            x = fusion(x, level, after)
        low = bilinear(self.head_low(x), (images.shape[1], images.shape[2]), "corners")
        out = self.head_out(jax.nn.relu(self.head_high(low)))[..., 0]
        return jax.nn.sigmoid(out.astype(jnp.float32)) * self.config.max_depth

    def prepare(self, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
        """Resizes as transformers' processor does through Pillow (antialiased bicubic), then normalises.

        Pillow computes in fixed point; a pixel may differ by one step of 1/255.
        """
        size = self.config.network_size((images.shape[1], images.shape[2]))
        values = images.astype(jnp.float32)
        if size != images.shape[1:3]:
            values = jax.image.resize(values, (len(images), *size, 3), "cubic", antialias=True)
            values = jnp.clip(jnp.round(values), 0, 255)
        return (values / 255.0 - IMAGE_MEAN) / IMAGE_STD

    def __call__(
        self, images: UInt8[Array, "B H W 3"], intrinsics: Float[Array, "B 3 3"] | None = None
    ) -> DepthPrediction:
        """Predicts depth.

        Args:
            images: RGB, 0..255.
            intrinsics: pixels of the images, one camera per image; passed through.
        """
        depth = self.network(self.prepare(images))
        if self.config.image_sized_output:
            depth = bilinear(depth[..., None], (images.shape[1], images.shape[2]))[..., 0]
        return DepthPrediction(depth, None, intrinsics)

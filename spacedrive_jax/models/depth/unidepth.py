"""UniDepthV2 (Piccinelli et al. 2025): metric depth from one image, with or without its camera."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from spacedrive_jax.bounds import POSITIVE, SIDE, Bound, Bounds, check_bounds
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.depth.backbone import (
    IMAGE_MEAN,
    IMAGE_STD,
    DepthPrediction,
    Dinov2,
    Dinov2Config,
    bilinear,
    linear,
)
from spacedrive_jax.models.depth.unidepth_decoder import (
    LOG_BOUND,
    LOG_RADIUS_OFFSET,
    CameraHead,
    DepthDecoder,
    camera_parameters,
)
from spacedrive_jax.models.layers import scan_layers, stack_layers

# Sizes, cameras and rays of UniDepthV2's inference (Piccinelli et al. 2025).


SMALLEST_X = 1e-3
"""Floor of |x| in a ray's azimuth, as in the published code."""


@dataclasses.dataclass(frozen=True)
class InferenceSize:
    """How images of one size are padded and scaled for the network; static."""

    image: tuple[int, int]
    """Height and width of the images, pixels."""
    padded: tuple[int, int]
    """The same after padding to a legal aspect ratio."""
    top: int
    left: int
    """Rows and columns of padding before the image."""
    factor: float
    """Scale of pixel coordinates (the network's sides are rounded up to whole patches on top of it)."""
    network: tuple[int, int]
    """Height and width of the network's input, pixels."""


def inference_size(
    image: tuple[int, int],
    *,
    ratio_bounds: tuple[float, float],
    pixel_bounds: tuple[float, float],
    multiple: int,
    resolution_level: int | None = None,
) -> InferenceSize:
    """Pads to a legal aspect ratio, then scales to a legal pixel count, as the published code does.

    One departure: the published code crops a column off some images of legal aspect (about one size in
    twenty, where a floating-point product falls below a whole number) and then returns a depth one column
    wide; here such images are not padded.

    Args:
        image: (height, width), pixels.
        ratio_bounds: smallest and largest width/height.
        pixel_bounds: smallest and largest pixel count of the network's input.
        multiple: patch size.
        resolution_level: 0..9 narrows the pixel bounds to that tenth; None keeps them.

    Raises:
        ConfigError: the level is out of range, or the image is empty or too small for the bounds.
    """
    height, width = image
    if height < 1 or width < 1:
        raise ConfigError(f"an image of {height}x{width} pixels has no depth")
    low, high = pixel_bounds
    if resolution_level is not None:
        if not 0 <= resolution_level < 10:
            raise ConfigError(f"resolution_level {resolution_level} must be 0..9")
        step = (high - low) / 10
        low, high = low + resolution_level * step, low + (resolution_level + 1) * step
    ratio = width / height
    legal = min(max(ratio, ratio_bounds[0]), ratio_bounds[1])
    padded = (int(width / legal), width) if ratio > legal else (height, max(width, int(height * legal)))
    pixels = padded[0] * padded[1]
    factor = math.sqrt(min(max(pixels, low), high) / pixels)
    rows, columns = (math.ceil(int(side * factor) / multiple) * multiple for side in padded)
    if min(rows, columns) < multiple or max(rows, columns) < 2 * multiple:
        raise ConfigError(
            f"images of {height}x{width} pixels reach the network as {rows}x{columns}, less than two patches "
            f"of {multiple}: give larger ones, or wider pixel_bounds"
        )
    return InferenceSize(
        image,
        padded,
        (padded[0] - height) // 2,
        (padded[1] - width) // 2,
        factor,
        (rows, columns),
    )


def to_network(intrinsics: Float[Array, "B 3 3"], size: InferenceSize) -> Float[Array, "B 4"]:
    """Intrinsics of the image to (fx, fy, cx, cy) in pixels of the network's input."""
    focal_x, focal_y = intrinsics[:, 0, 0], intrinsics[:, 1, 1]
    centre_x, centre_y = intrinsics[:, 0, 2] + size.left, intrinsics[:, 1, 2] + size.top
    return jnp.stack([focal_x, focal_y, centre_x, centre_y], axis=-1).astype(jnp.float32) * size.factor


def to_image(parameters: Float[Array, "B 4"], size: InferenceSize) -> Float[Array, "B 3 3"]:
    """Inverse of `to_network`."""
    return intrinsic_matrix(parameters / size.factor - jnp.array([0, 0, size.left, size.top], jnp.float32))


def intrinsic_matrix(parameters: Float[Array, "B 4"]) -> Float[Array, "B 3 3"]:
    """(fx, fy, cx, cy) to 3x3 matrices."""
    focal_x, focal_y, centre_x, centre_y = jnp.moveaxis(parameters, -1, 0)
    zero, one = jnp.zeros_like(focal_x), jnp.ones_like(focal_x)
    rows = [[focal_x, zero, centre_x], [zero, focal_y, centre_y], [zero, zero, one]]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def pixel_rays(parameters: Float[Array, "B 4"], size: tuple[int, int]) -> Float[Array, "B H W 3"]:
    """Unit rays through the pixel centres (index + 0.5) of images of `size`, camera frame."""
    v = jnp.arange(size[0], dtype=jnp.float32)[:, None] + 0.5
    u = jnp.arange(size[1], dtype=jnp.float32)[None, :] + 0.5
    focal_x, focal_y, centre_x, centre_y = (each[:, None, None] for each in jnp.moveaxis(parameters, -1, 0))
    shape = (parameters.shape[0], *size)
    x = jnp.broadcast_to((u - centre_x) / focal_x, shape)
    y = jnp.broadcast_to((v - centre_y) / focal_y, shape)
    rays = jnp.stack([x, y, jnp.ones_like(x)], axis=-1)
    return rays / jnp.linalg.norm(rays, axis=-1, keepdims=True)


def normalised(vectors: Float[Array, "*B C"], floor: float) -> Float[Array, "*B C"]:
    """Vectors over their norm, which counts as `floor` at least."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), floor)


def ray_angles(rays: Float[Array, "B H W 3"], grid: tuple[int, int]) -> Float[Array, "B P 2"]:
    """Polar angle and azimuth of the rays averaged over each cell of a grid, radians, row-major."""
    # Smoothed with the triangle filter of an antialiased bilinear resize.
    shape = (rays.shape[0], *grid, 3)
    x, y, z = jnp.moveaxis(normalised(jax.image.resize(rays, shape, "linear", antialias=True), 1e-4), -1, 0)
    polar = jnp.arccos(jnp.clip(z, -1.0, 1.0))
    away_from_zero = jnp.where(x >= 0, 1.0, -1.0) * jnp.maximum(jnp.abs(x), SMALLEST_X)
    azimuth = jnp.arctan2(y, away_from_zero)
    return jnp.stack([polar, azimuth], axis=-1).reshape(rays.shape[0], -1, 2)


def ray_embedding(angles: Float[Array, "B P 2"], grid: tuple[int, int], width: int) -> Float[Array, "B P D"]:
    """Sines of both angles at D/2 octave-spaced frequencies: all of the polar angle, then of the azimuth."""
    top = math.log2(max(grid) // 2)
    frequencies = jnp.exp2(jnp.linspace(0.0, top, width // 2, dtype=jnp.float32))
    waves = jnp.sin(jnp.pi * angles[..., None] * frequencies)
    return waves.reshape(*angles.shape[:2], -1)


NUM_TAPS = 4


@dataclasses.dataclass(frozen=True)
class UniDepthConfig:
    """Architecture and inference sizes. The defaults are the released ViT-S/14 model's."""

    encoder: Dinov2Config = Dinov2Config.named("vits14", final_norm_eps=1e-5)  # noqa: RUF009  (frozen)
    width: int = 256
    """D of the decoder."""
    heads: int = 8
    expansion: int = 4
    units: tuple[int, int, int] = (2, 2, 2)
    """Residual units of the three upsampling stages."""
    head_hidden: int = 32
    ratio_bounds: tuple[float, float] = (0.5, 2.5)
    """Smallest and largest width/height that is not padded."""
    pixel_bounds: tuple[float, float] = (200_000, 600_000)
    """Smallest and largest pixel count of the network's input."""
    resolution_level: int | None = None
    """0..9 narrows `pixel_bounds` to that tenth; the released models leave it open."""

    BOUNDS: ClassVar[Bounds] = {
        "width": SIDE,
        "heads": SIDE,
        "expansion": SIDE,
        "units": Bound(1, 1024),
        "head_hidden": SIDE,
        "ratio_bounds": POSITIVE,
        "pixel_bounds": Bound(1, 1e9),
        "resolution_level": Bound(0, 9),
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS)
        for name in ("ratio_bounds", "pixel_bounds"):
            limits = getattr(self, name)
            if len(limits) != 2 or limits[0] > limits[1]:
                raise ConfigError(f"{name} {limits} must be a smallest and a largest value")
        if len(self.encoder.taps) != NUM_TAPS:
            raise ConfigError(f"UniDepthV2 reads {NUM_TAPS} taps of its encoder, not {self.encoder.taps}")
        if self.width % self.heads or self.width % 8:
            raise ConfigError(f"decoder width {self.width} must be a multiple of 8 and of heads {self.heads}")

    @classmethod
    def named(cls, name: str) -> UniDepthConfig:
        """The released sizes.

        Args:
            name: `vits14`, `vitb14` or `vitl14`.
        """
        widths = {"vits14": 256, "vitb14": 384, "vitl14": 512}
        return cls(encoder=Dinov2Config.named(name, final_norm_eps=1e-5), width=widths[name])

    def inference_size(self, image: tuple[int, int]) -> InferenceSize:
        """Padding and scaling of images of (height, width) pixels."""
        return inference_size(
            image,
            ratio_bounds=self.ratio_bounds,
            pixel_bounds=self.pixel_bounds,
            multiple=self.encoder.patch_size,
            resolution_level=self.resolution_level,
        )


class NetworkOutput(NamedTuple):
    """At the size of the network's input."""

    log_radius: Float[Array, "B H W"]
    """Raw logarithm of the distance along the ray, before bounds and offset."""
    log_confidence: Float[Array, "B H W"]
    rays: Float[Array, "B H W 3"]
    """Unit vectors, camera frame: of the given camera, else of the predicted one."""
    camera: Float[Array, "B 4"]
    """Predicted (fx, fy, cx, cy), pixels of the network's input."""
    latents: Float[Array, "B h w D"]

    @property
    def radius(self) -> Float[Array, "B H W"]:
        """Distance along the ray, metres."""
        return jnp.exp(jnp.clip(self.log_radius, -LOG_BOUND, LOG_BOUND) + LOG_RADIUS_OFFSET)

    @property
    def confidence(self) -> Float[Array, "B H W"]:
        """Estimated error in log space."""
        return jnp.exp(jnp.clip(self.log_confidence, -LOG_BOUND, LOG_BOUND))


class UniDepthInference(NamedTuple):
    """Everything the published `infer` returns, at the images' size, channels last."""

    depth: Float[Array, "B H W"]
    confidence: Float[Array, "B H W"]
    intrinsics: Float[Array, "B 3 3"]
    """Predicted, pixels of the images; also where a camera was given."""
    points: Float[Array, "B H W 3"]
    """Camera frame, metres."""
    rays: Float[Array, "B H W 3"]
    radius: Float[Array, "B H W"]
    latents: Float[Array, "B h w D"]


class UniDepthV2(nnx.Module):
    """The network; traceable by jax.jit."""

    def __init__(
        self, config: UniDepthConfig, *, compute: ComputeConfig | None = None, rngs: nnx.Rngs
    ) -> None:
        """Draws a fresh network.

        Args:
            config: architecture and inference sizes.
            compute: dtypes, rematerialisation, attention kernel; float32 by default.
            rngs: random streams (`params`).
        """
        compute = compute or ComputeConfig()
        self.config, self.compute = config, compute
        self.encoder = Dinov2(config.encoder, compute=compute, rngs=rngs)

        def adapter(streams: nnx.Rngs) -> nnx.Linear:
            return linear(config.encoder.width, config.width, compute=compute, rngs=streams)

        self.feature_adapters = stack_layers(adapter, NUM_TAPS, rngs)
        self.token_adapters = stack_layers(adapter, NUM_TAPS, rngs)
        self.camera_head = CameraHead(
            config.width, config.heads, config.expansion, compute=compute, rngs=rngs
        )
        self.decoder = DepthDecoder(
            config.width,
            config.heads,
            config.expansion,
            config.units,
            head_hidden=config.head_hidden,
            compute=compute,
            rngs=rngs,
        )

    def adapt(self, adapters: nnx.Linear, taps: Float[Array, "4 *B C"]) -> Float[Array, "4 *B D"]:
        """Maps every tap to the decoder's width by a linear layer of its own."""

        def apply(layer: nnx.Linear, carry: None, tap: Any) -> tuple[None, Any]:
            return None, layer(tap)

        return scan_layers(adapters, apply, None, taps, self.compute)[1]

    def network(
        self, images: Float[Array, "B H W 3"], camera: Float[Array, "B 4"] | None = None
    ) -> NetworkOutput:
        """The network proper.

        Args:
            images: normalised, sides a multiple of the patch size.
            camera: (fx, fy, cx, cy) in pixels of `images`, one per image; None takes the predicted one.
        """
        size = (images.shape[1], images.shape[2])
        features, tokens = self.encoder(images)
        tokens = self.adapt(self.token_adapters, tokens)
        predicted = camera_parameters(self.camera_head(tokens.swapaxes(0, 1)), size)
        rays = pixel_rays(predicted if camera is None else camera, size)
        grid = self.encoder.grid(*size)
        embedding = ray_embedding(ray_angles(rays, grid), grid, self.config.width)
        decoded = self.decoder(self.adapt(self.feature_adapters, features), embedding, size)
        return NetworkOutput(decoded.log_radius, decoded.log_confidence, rays, predicted, decoded.latents)

    def prepare(self, images: UInt8[Array, "B H W 3"], size: InferenceSize) -> Float[Array, "B h w 3"]:
        """Normalises, pads with the mean colour and resizes to the network's size."""
        values = (images.astype(jnp.float32) / 255.0 - IMAGE_MEAN) / IMAGE_STD
        bottom = size.padded[0] - size.image[0] - size.top
        right = size.padded[1] - size.image[1] - size.left
        values = jnp.pad(values, ((0, 0), (size.top, bottom), (size.left, right), (0, 0)))
        return bilinear(values, size.network)

    def infer(
        self,
        images: UInt8[Array, "B H W 3"],
        intrinsics: Float[Array, "_ 3 3"] | None = None,
    ) -> UniDepthInference:
        """The published `infer`, whole.

        The published code takes one camera for all images of a batch (fidelity Q29); here each has its own.

        Args:
            images: RGB, 0..255, any real type.
            intrinsics: pixels of the images.

        Raises:
            ConfigError: the shapes do not fit.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ConfigError(f"images {images.shape} must be (batch, height, width, 3)")
        if intrinsics is not None and intrinsics.shape != (images.shape[0], 3, 3):
            raise ConfigError(
                f"intrinsics {intrinsics.shape} must be ({images.shape[0]}, 3, 3), one per image"
            )
        size = self.config.inference_size((images.shape[1], images.shape[2]))
        camera = None if intrinsics is None else to_network(intrinsics, size)
        output = self.network(self.prepare(images, size), camera)

        def restore(x: jax.Array) -> jax.Array:
            rows = slice(size.top, size.top + size.image[0])
            columns = slice(size.left, size.left + size.image[1])
            return bilinear(x, size.padded)[:, rows, columns]

        # The points are resized, not radius and rays apart: the two differ by a part in a thousand.
        points = restore(output.rays * output.radius[..., None])
        return UniDepthInference(
            depth=points[..., 2],
            confidence=restore(output.confidence[..., None])[..., 0],
            intrinsics=to_image(output.camera, size),
            points=points,
            rays=normalised(restore(output.rays), 1e-5),
            radius=jnp.linalg.norm(points, axis=-1),
            latents=output.latents,
        )

    def __call__(
        self,
        images: UInt8[Array, "B H W 3"],
        intrinsics: Float[Array, "_ 3 3"] | None = None,
    ) -> DepthPrediction:
        """Predicts depth.

        Args:
            images: RGB, 0..255.
            intrinsics: pixels of the images, one camera per image; None predicts them.
        """
        inferred = self.infer(images, intrinsics)
        return DepthPrediction(inferred.depth, inferred.confidence, inferred.intrinsics)

"""Images to the patches that a vision tower takes, on the host and on the device, with the same bits.

Two callers: SpaceDrive hands in views of one size as bytes and has the device do the rest (`view_patches`,
`normalise`), which spares the host half of a sample's time and the way to the device half of its bytes; the
bare vision-language model takes images of any size as the published processor does, floats and all
(`process_images`).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Num, UInt8
from PIL import Image

from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.models.config import SquareVisionConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation (Radford et al. 2021), after division by 255."""
HALVES = (0.5, 0.5, 0.5)
"""Mean and deviation that bring 0..255 to -1..1."""


@dataclasses.dataclass(frozen=True)
class ProcessorSettings:
    """What a published processor does to images of any size (transformers' preprocessor_config.json)."""

    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    rescale_factor: float = 1 / 255
    size: tuple[tuple[str, int], ...] = ()
    """What the file says of sizes, by its own names (`shortest_edge`, `longest_edge`, `height`, `width`;
    `crop_height`, `crop_width`); each family reads those that it knows."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """`size` by name."""
        return dict(self.size)


class ImageProcessor(abc.ABC):
    """Cuts images of one size into patches, bit for bit as the family's published processor does.

    A family says what size images are resized to (`resized`), with which filter, and how they are cut.
    """

    mean: ClassVar[tuple[float, float, float]] = CLIP_MEAN
    std: ClassVar[tuple[float, float, float]] = CLIP_STD
    published: ClassVar[ProcessorSettings] = ProcessorSettings()
    """The released checkpoints' settings, for a checkpoint that brings none of its own."""
    fallback: ClassVar[ProcessorSettings] = ProcessorSettings()
    """What transformers' class takes for a field that a checkpoint's own file leaves out."""
    resample: ClassVar[Image.Resampling] = Image.Resampling.BICUBIC
    pads: ClassVar[bool] = False
    """Whether it minds `do_pad` in that file; one that does not refuses it."""

    resized: tuple[int, int]
    """(height, width) that SpaceDrive's views are resized to before they are cut."""
    patch_grid: tuple[int, int]
    """Patches of an image, rows and columns."""
    token_grid: tuple[int, int]
    """Visual tokens of an image, rows and columns."""
    intrinsics_size: tuple[int, int]
    """(height, width) in whose pixels the published SpaceDrive counts intrinsics and patch centres."""

    def __init__(
        self, vision: Any, image_size: tuple[int, int], settings: ProcessorSettings | None = None
    ) -> None:
        """Settles the grids.

        Args:
            vision: the family's vision config.
            image_size: (height, width) of the images that will be handed in.
            settings: a published processor's, to do as it does to images of any size; None for SpaceDrive's
                views, whose size is the caller's choice: they are brought to whole visual tokens, and that
                is all.
        """
        self.vision = vision
        self.image_size = image_size
        self.settings = settings

    def patches(self, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "N P K"]:
        """Patches of images of `image_size`, 0..255; P patches in the tower's order, K values a patch."""
        return np.asarray(self.cut(np.stack([self.resize(image) for image in images])))

    def view_patches(self, views: UInt8[Array, "N H W 3"]) -> UInt8[Array, "N P K"]:
        """The same of SpaceDrive's views, on the device."""
        return jnp.asarray(self.cut(resize_on_device(views, *self.resized, self.resample)))

    def resize(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """An image of `image_size` as it is cut, by Pillow."""
        return resize(image, *self.resized, self.resample)

    @abc.abstractmethod
    def cut(self, images: UInt8[np.ndarray | Array, "N h w 3"]) -> UInt8[np.ndarray | Array, "N P K"]:
        """Cuts resized images into patches: numpy's stay numpy's."""


class SquareImageProcessor(ImageProcessor):
    """Makes squares of one size of images and cuts them row by row."""

    def __init__(
        self,
        vision: SquareVisionConfig,
        image_size: tuple[int, int],
        settings: ProcessorSettings | None = None,
    ) -> None:
        """See `ImageProcessor`.

        Raises:
            ConfigError: the settings ask for a square that the tower does not take.
        """
        super().__init__(vision, image_size, settings)
        self.side = self.square_side()
        patches = self.side // vision.patch_size
        self.patch_grid = (patches, patches)
        self.token_grid = (patches // vision.merge_size, patches // vision.merge_size)
        self.intrinsics_size = self.resized = (self.side, self.side)

    @abc.abstractmethod
    def square_side(self) -> int:
        """Side of the square in pixels.

        Raises:
            ConfigError: the settings ask for one that the tower does not take.
        """

    def cut(self, images: UInt8[np.ndarray | Array, "N h w 3"]) -> UInt8[np.ndarray | Array, "N P K"]:
        """Patches in row-major order, without a border of less than one; K is channel, row, column."""
        seen = self.patch_grid[0] * self.vision.patch_size
        return flatten_patches(images[:, :seen, :seen].transpose(0, 3, 1, 2), self.vision.patch_size)


def flatten_patches(
    pixel_values: Num[np.ndarray | Array, "... C H W"], patch_size: int
) -> Num[np.ndarray | Array, "... P K"]:
    """Cuts images, as the published image processors hand them over, into the flattened patches towers take.

    Args:
        pixel_values: images, normalised or not.
        patch_size: side of a patch in pixels.

    Returns:
        Patches in row-major order, each channels x rows x columns in one axis.

    Raises:
        ConfigError: the image does not divide into patches.
    """
    *lead, channels, height, width = pixel_values.shape
    if height % patch_size or width % patch_size:
        raise ConfigError(f"images of {height}x{width} pixels do not divide into patches of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    cut = pixel_values.reshape(*lead, channels, rows, patch_size, columns, patch_size)
    count = len(lead)
    order = (*range(count), *(count + axis for axis in (1, 3, 0, 2, 4)))
    return cut.transpose(order).reshape(*lead, rows * columns, channels * patch_size**2)


def process_images(
    kind: type[ImageProcessor],
    vision: Any,
    images: Sequence[Image.Image | UInt8[np.ndarray, "_ _ 3"]],
    settings: ProcessorSettings | None = None,
) -> tuple[Float[np.ndarray, "P K"], Int[np.ndarray, "N 3"]]:
    """Images of any sizes as the family's published processor prepares them, one after the other.

    Args:
        kind: the family's processor.
        vision: its vision config.
        images: PIL images (of any mode; what is transparent is laid on white) or arrays.
        settings: those of the checkpoint; None for the released ones.

    Returns:
        `pixel_values`, normalised patches of all images, float32, and `image_grid_thw`, (1, patch rows, patch
        columns) of each image.

    Raises:
        DataError: there are no images, or one is neither a PIL image nor such an array.
    """
    if not isinstance(images, Sequence) or not images:
        raise DataError("process takes a list of images, PIL's or uint8 arrays (height, width, 3)")
    settings = settings or kind.published
    patches, grids = [], []
    for number, image in enumerate(images):
        pixels = _rgb(image, number)
        processor = kind(vision, pixels.shape[:2], settings)
        patches.append(normalise_on_host(processor.patches([pixels])[0], settings))
        grids.append((1, *processor.patch_grid))
    return np.concatenate(patches), np.asarray(grids, np.int32)


def _rgb(image: Image.Image | np.ndarray, number: int) -> UInt8[np.ndarray, "H W 3"]:
    if isinstance(image, Image.Image):
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    is_array = isinstance(image, np.ndarray)
    if not is_array or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        what = f"{image.dtype} array {image.shape}" if is_array else type(image).__name__
        raise DataError(
            f"image {number} is a {what}: give a PIL image or a uint8 array (height, width, 3), 0..255, RGB"
        )
    return image


def resize(
    image: UInt8[np.ndarray, "H W 3"],
    height: int,
    width: int,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> UInt8[np.ndarray, "h w 3"]:
    """Pillow's resize, which transformers' processors use."""
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


def resize_on_device(
    images: UInt8[Array, "N H W 3"], height: int, width: int, resample: Image.Resampling
) -> UInt8[Array, "N h w 3"]:
    """`resize` of images of one size, bit for bit: whole numbers, first along rows and then along columns.

    Args:
        images: on the device, or traced.
        height: of the result; static, as the width is.
        width: likewise.
        resample: bicubic or Lanczos.
    """
    if images.shape[2] != width:
        turned = jnp.swapaxes(images, 1, 2)  # taken from along an outer axis: whole rows, not single pixels
        images = jnp.swapaxes(_resize_rows(turned, width, resample), 1, 2)
    return images if images.shape[1] == height else _resize_rows(images, height, resample)


def _resize_rows(
    images: UInt8[Array, "N H W 3"], height: int, resample: Image.Resampling
) -> UInt8[Array, "N h W 3"]:
    places, weights = resize_weights(images.shape[1], height, resample)
    total: Any = 1 << (_WEIGHT_BITS - 1)
    for place, weight in zip(places.T, weights.T, strict=True):
        rows = jnp.take(images, jnp.asarray(place), axis=1).astype(jnp.int32)
        total = total + rows * jnp.asarray(weight)[None, :, None, None]
    return jnp.clip(total >> _WEIGHT_BITS, 0, 255).astype(jnp.uint8)


_WEIGHT_BITS = 22
"""Behind the point of Pillow's weights for bytes."""


@functools.cache
def resize_weights(
    size: int, wanted: int, resample: Image.Resampling
) -> tuple[Int32[np.ndarray, "wanted taps"], Int32[np.ndarray, "wanted taps"]]:
    """Pillow's resampling along one axis (libImaging's Resample.c): what is read, and with which weights.

    Args:
        size: pixels there are.
        wanted: pixels of the result.
        resample: bicubic or Lanczos.

    Returns:
        Places, and weights in 22 bits behind the point; 0 where a pixel has fewer taps than others.
    """
    kernel, reach = {
        Image.Resampling.BICUBIC: (_bicubic, 2.0),
        Image.Resampling.LANCZOS: (_lanczos, 3.0),
    }[resample]
    step = size / wanted
    stretch = max(step, 1.0)
    support = reach * stretch
    taps = math.ceil(support) * 2 + 1
    places, weights = np.zeros((wanted, taps), np.int32), np.zeros((wanted, taps), np.int32)
    for pixel in range(wanted):
        centre = (pixel + 0.5) * step
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), size)
        found = [kernel((place - centre + 0.5) * (1.0 / stretch)) for place in range(first, last)]
        total = 0.0
        for each in found:  # in order, as Pillow adds them up
            total += each
        for tap, each in enumerate(found):
            scaled = each / total * (1 << _WEIGHT_BITS)
            places[pixel, tap] = first + tap
            weights[pixel, tap] = int(scaled - 0.5 if scaled < 0 else scaled + 0.5)
    used = int(np.flatnonzero(weights.any(axis=0))[-1]) + 1
    return places[:, :used], weights[:, :used]


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


def normalise(
    patches: UInt8[Array, "... K"],
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> Float[Array, "... K"]:
    """Rescales and normalises raw patches.

    Args:
        patches: K runs over channel, then time and pixels, as the image processors lay patches out.
        mean: of the channels, after division by 255.
        std: likewise.
    """
    per_channel = patches.shape[-1] // 3
    means, deviations = (
        jax.lax.broadcast_to_rank(np.repeat(np.asarray(each, np.float32), per_channel), patches.ndim)
        for each in (mean, std)
    )
    return (patches.astype(jnp.float32) / 255.0 - means) / deviations


def normalise_on_host(
    patches: UInt8[np.ndarray, "... K"], settings: ProcessorSettings
) -> Float[np.ndarray, "... K"]:
    """Rescales and normalises raw patches with the roundings of transformers' PIL processors.

    Args:
        patches: 0..255; K runs over channel, then time and pixels.
        settings: factor, mean and deviation.
    """
    # In float64 and rounded, then in float32: as transformers.image_transforms does.
    levels = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    mean, std = (np.asarray(each, np.float32)[:, None] for each in (settings.mean, settings.std))
    table = (levels - mean) / std  # (channel, level)
    channels = patches.reshape(*patches.shape[:-1], 3, -1)
    return table[np.arange(3)[:, None], channels].reshape(patches.shape)

"""Images to the patches that a vision tower takes, on the host.

Two callers: SpaceDrive hands in views of one size as bytes and normalises them on the device (`normalise`);
the bare vision-language model takes images of any size as the published processor does, floats and all
(`process_images`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from spacedrive_jax.errors import DataError

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
    """Cuts images of one size into patches, bit for bit as the family's published processor does."""

    mean: ClassVar[tuple[float, float, float]] = CLIP_MEAN
    std: ClassVar[tuple[float, float, float]] = CLIP_STD
    published: ClassVar[ProcessorSettings] = ProcessorSettings()
    """The released checkpoints' settings, for a checkpoint that brings none of its own."""
    fallback: ClassVar[ProcessorSettings] = ProcessorSettings()
    """What transformers' class takes for a field that a checkpoint's own file leaves out."""
    resample: ClassVar[Image.Resampling] = Image.Resampling.BICUBIC
    pads: ClassVar[bool] = False
    """Whether it minds `do_pad` in that file; one that does not refuses it."""

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

    @abc.abstractmethod
    def patches(self, images: list[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "N P K"]:
        """Patches of images of `image_size`, 0..255; P patches in the tower's order, K values a patch."""


def process_images(
    kind: type[ImageProcessor],
    vision: Any,
    images: Sequence[Image.Image | UInt8[np.ndarray, "_ _ 3"]],
    settings: ProcessorSettings | None = None,
) -> tuple[Float[np.ndarray, "P K"], Int[np.ndarray, "N 2"]]:
    """Images of any sizes as the family's published processor prepares them, one after the other.

    Args:
        kind: the family's processor.
        vision: its vision config.
        images: PIL images (of any mode; what is transparent is laid on white) or arrays.
        settings: those of the checkpoint; None for the released ones.

    Returns:
        Normalised patches of all images, float32, and each image's patch grid (rows, columns).

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
        grids.append(processor.patch_grid)
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


def bicubic(image: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Pillow's bicubic resize, which transformers' processors use."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def normalise(
    patches: UInt8[Array, "... K"] | Float[Array, "... K"],
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> Float[Array, "... K"]:
    """Rescales and normalises raw patches; floats are taken to be normalised already.

    Args:
        patches: K runs over channel, then time and pixels, as the image processors lay patches out.
        mean: of the channels, after division by 255.
        std: likewise.
    """
    if patches.dtype != jnp.uint8:
        return patches
    per_channel = patches.shape[-1] // 3
    means, deviations = (
        jnp.asarray(np.repeat(np.asarray(each, np.float32), per_channel)) for each in (mean, std)
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

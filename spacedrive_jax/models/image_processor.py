"""Images to the patches that a vision tower takes, on the host.

Rescaling and normalisation are left to the device (`normalise`), so that bytes, not floats, travel there.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation (Radford et al. 2021), after division by 255."""


class ImageProcessor(abc.ABC):
    """Cuts images of one size into patches, bit for bit as the family's published processor does."""

    mean: ClassVar[tuple[float, float, float]] = CLIP_MEAN
    std: ClassVar[tuple[float, float, float]] = CLIP_STD

    patch_grid: tuple[int, int]
    """Patches of an image, rows and columns."""
    token_grid: tuple[int, int]
    """Visual tokens of an image, rows and columns."""
    intrinsics_size: tuple[int, int]
    """(height, width) in whose pixels the published SpaceDrive counts intrinsics and patch centres."""

    def __init__(self, vision: Any, image_size: tuple[int, int]) -> None:
        """Settles the grids.

        Args:
            vision: the family's vision config.
            image_size: (height, width) of the images that will be handed in.
        """
        self.vision = vision
        self.image_size = image_size

    @abc.abstractmethod
    def patches(self, images: list[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "N P K"]:
        """Patches of images of `image_size`, 0..255; P patches in the tower's order, K values a patch."""


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

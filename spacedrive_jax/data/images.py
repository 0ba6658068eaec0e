"""Encoded camera images to the image processor's patches."""

from __future__ import annotations

import os

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from spacedrive_jax.errors import DataError

# transformers announces at import that torch is absent; its processors do not need it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.encoded_images import decode_photo
from spacedrive_jax.data.schema import Record
from spacedrive_jax.models.config import ClipVisionConfig, QwenVisionConfig
from spacedrive_jax.models.families.llava import flatten_patches

MAX_PIXELS = 28 * 28 * 16384
"""Larger images are scaled down (released Qwen2.5-VL settings)."""


class ImageProcessor:
    """Decodes, squashes and cuts the six views into patches, as the model's own image processor does.

    Rescaling and normalisation are left to the device, so that bytes, not floats, travel there. Qwen:
    transformers' processor resizes to whole patches. LLaVA: bicubic to the one size its tower knows.
    """

    def __init__(
        self,
        vision: QwenVisionConfig | ClipVisionConfig,
        image_size: tuple[int, int],
        *,
        channel_order: str = "rgb",
    ) -> None:
        """Prepares a processor.

        Args:
            vision: patch and merge sizes.
            image_size: (height, width) every view is squashed to first (published: 640x640, bilinear).
            channel_order: `rgb`, or `bgr` as the published pipeline.
        """
        self.image_size = image_size
        self.channel_order = channel_order
        self.vision = vision
        if isinstance(vision, ClipVisionConfig):
            side = vision.image_size
            self.patch_grid = self.token_grid = (vision.grid_side, vision.grid_side)
            self.intrinsics_size = (side, side)
            return
        side = vision.patch_size * vision.merge_size
        self._processor = Qwen2VLImageProcessorPil(
            do_rescale=False,
            do_normalize=False,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.merge_size,
            min_pixels=min(56 * 56, side * side),
            max_pixels=MAX_PIXELS,
        )
        height, width = image_size
        example = np.zeros((height, width, 3), np.uint8)
        _, rows, columns = self._processor(images=[example], return_tensors="np")["image_grid_thw"][0]
        self.patch_grid = (int(rows), int(columns))
        """Patches per view, rows and columns."""
        self.token_grid = (self.patch_grid[0] // vision.merge_size, self.patch_grid[1] // vision.merge_size)
        """Visual tokens per view, rows and columns."""
        self.intrinsics_size = image_size
        """(height, width) in whose pixels the published code counts intrinsics: the squashed view's, even
        where the processor changes it once more (Qwen: 640 to 644; fidelity Q15)."""

    def __call__(self, record: Record) -> UInt8[np.ndarray, "N P K"]:
        """Patches of the record's views, 0..255.

        Raises:
            DataError: an image is absent or cannot be decoded.
        """
        images = []
        for camera, encoded in zip(CAMERAS, record["images"], strict=True):
            if not encoded:
                raise DataError(
                    f"keyframe {record['token']} has no {camera} image: it was converted with "
                    "--missing-images empty; convert with `render`, or `skip` such keyframes"
                )
            image = decode_photo(encoded, f"keyframe {record['token']}: the {camera} image")
            height, width = self.image_size
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
            images.append(image if self.channel_order == "rgb" else image[..., ::-1])
        return self.patches(images)

    def patches(self, images: list[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "N P K"]:
        """Patches of images that were squashed to `image_size` already, 0..255."""
        if isinstance(self.vision, ClipVisionConfig):
            resized = [
                np.asarray(Image.fromarray(image).resize(self.intrinsics_size, Image.Resampling.BICUBIC))
                for image in images
            ]
            return np.asarray(
                flatten_patches(np.stack(resized).transpose(0, 3, 1, 2), self.vision.patch_size)
            )
        patches = self._processor(images=images, return_tensors="np")["pixel_values"]
        return patches.astype(np.uint8).reshape(len(images), -1, patches.shape[-1])


def scaled_intrinsics(record: Record, image_size: tuple[int, int]) -> Float[np.ndarray, "N 3 3"]:
    """Intrinsics of the views squashed to `image_size` (height, width), pixels."""
    native = record["image_size"].astype(np.float64)
    scale = np.stack(
        [image_size[1] / native[:, 1], image_size[0] / native[:, 0], np.ones(len(native))], axis=1
    )
    return record["camera_intrinsics"] * scale[:, :, None]

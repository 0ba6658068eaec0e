"""Encoded camera images to the image processor's patches."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.encoded_images import decode_photo
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.models.image_processor import ImageProcessor


class ViewProcessor:
    """Decodes the six views of a record, resizes them to one size and hands them to the image processor."""

    def __init__(self, processor: ImageProcessor, *, channel_order: Literal["rgb", "bgr"] = "rgb") -> None:
        """Prepares it.

        Args:
            processor: the family's; its `image_size` is what every view is resized to first (published:
                640x640, bilinear), whatever its shape.
            channel_order: `rgb`, or `bgr` as the published pipeline.
        """
        self.processor, self.channel_order = processor, channel_order
        self.token_grid = processor.token_grid
        """Visual tokens per view, rows and columns."""
        self.intrinsics_size = processor.intrinsics_size
        """(height, width) in whose pixels the published code counts intrinsics."""

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
            height, width = self.processor.image_size
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
            images.append(image if self.channel_order == "rgb" else image[..., ::-1])
        return self.processor.patches(images)


def scaled_intrinsics(record: Record, image_size: tuple[int, int]) -> Float[np.ndarray, "N 3 3"]:
    """Intrinsics of the views resized to `image_size` (height, width), pixels."""
    native = record["image_size"].astype(np.float64)
    scale = np.stack(
        [image_size[1] / native[:, 1], image_size[0] / native[:, 0], np.ones(len(native))], axis=1
    )
    return record["camera_intrinsics"] * scale[:, :, None]

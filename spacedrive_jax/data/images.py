"""Encoded pictures to pixels, and to views of the size that the image processor takes.

The one place where bytes from somebody's file become an image.

Pillow decodes, never OpenCV: the OpenCV that the golden numbers need for rasterising (4.10) reads memory it
does not own on a crafted JPEG (CVE-2025-53644) and fills a cut one with whatever the buffer held before,
another image's pixels. On photographs of nuScenes both give the same pixels. Here a picture is whole or an
error, of a known kind, and no larger than it may be before any memory is taken for it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import ClassVar, Literal

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from spacedrive_jax import exact
from spacedrive_jax.bounds import ANY, SHARE, Bounds, check_bounds
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.schema import DEPTH_SCALE, Record
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.models.image_processor import ImageProcessor

MAX_PIXELS = 8192 * 8192
"""Largest picture that is decoded; a nuScenes photograph has 1600 x 900."""

Size = tuple[int, int]


def decode_photo(encoded: bytes, what: str, size: Size | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """A JPEG (or, for drawn pictures, PNG) as RGB.

    An orientation in the EXIF data is not applied: calibration counts the stored rows and columns.

    Args:
        encoded: the file's bytes.
        what: what to call it in an error (`keyframe 3f…: the CAM_FRONT image`).
        size: (height, width) it must have.

    Raises:
        DataError: it is damaged, cut, of another kind, too large, or of another size.
    """
    return np.array(_photo(encoded, what, size))


def _photo(encoded: bytes, what: str, size: Size | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """The same, not to be written to."""
    image = _decode(encoded, what, ("JPEG", "PNG"), ("RGB", "L"), size)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def check_photo(encoded: bytes, what: str) -> None:
    """Refuses a JPEG that is damaged in its middle, though it begins and ends as it should and decodes.

    JPEG has no checksum, and Pillow passes over the decoder's warnings. What damage leaves behind is that the
    codes of the pixels run out before the picture ends, or go on behind it. Both show when something else
    stands at the end of the codes: behind them it must change nothing, in their place it must. On nuScenes'
    photographs 64 bytes and more that were lost or overwritten are found so in nine cases of ten, a single
    flipped bit in one of eight: most leave codes of other colours, which nothing tells from the right ones.
    It takes the time of three decodings.

    Args:
        encoded: a JPEG, or a PNG, which has checksums.
        what: what to call it in an error.

    Raises:
        DataError: it is damaged.
    """
    pixels = decode_photo(encoded, what)
    codes = encoded.rstrip(b"\0").removesuffix(_END_OF_IMAGE)
    if not encoded.startswith(b"\xff\xd8") or len(codes) < 64:
        return
    behind = _decoded_with(codes, b"\x55\xaa" * 32)
    if behind is not None and not np.array_equal(behind, pixels):
        raise DataError(f"{what} is damaged inside: the codes of its pixels run out before it is whole")
    # Nothing follows from the end of a progressive JPEG, whose last scan may hold next to nothing, nor from
    # that of a flat picture, whose few codes may mean the same as any others.
    progressive = b"\xff\xc2" in encoded[: encoded.find(b"\xff\xda")]
    if progressive or np.ptp(pixels[-16:]) == 0:
        return
    cut = len(codes) - _END_BYTES
    while codes[cut - 1] == 0xFF:  # never between 0xFF and its stuffed byte
        cut -= 1
    for other in (b"\x33" * _END_BYTES, b"\x6a" * _END_BYTES):  # one of the two is not what stood there
        instead = _decoded_with(codes[:cut], other)
        if instead is None or not np.array_equal(instead, pixels):
            return
    raise DataError(f"{what} is damaged inside: it is whole before the codes of its pixels end")


_END_OF_IMAGE = b"\xff\xd9"
_END_BYTES = 12


def _decoded_with(codes: bytes, tail: bytes) -> UInt8[np.ndarray, "H W 3"] | None:
    """The pixels of a JPEG with another end; None where it cannot be decoded."""
    try:
        return decode_photo(codes + tail + _END_OF_IMAGE, "")
    except DataError:
        return None


def decode_depth(encoded: bytes, what: str, size: Size | None = None) -> Float[np.ndarray, "H W"]:
    """A 16-bit greyscale PNG as metres, float32, 0 where unknown (see `DEPTH_SCALE`).

    Raises:
        DataError: see `decode_photo`.
    """
    image = _decode(encoded, what, ("PNG",), ("I;16", "I;16B", "I"), size)
    return np.asarray(image).astype(np.float32) / np.float32(DEPTH_SCALE)


def decode_grey(encoded: bytes, what: str, size: Size | None = None) -> UInt8[np.ndarray, "H W"]:
    """A PNG of 1 or 8 bits a pixel as 0..255.

    Raises:
        DataError: see `decode_photo`.
    """
    return np.array(_decode(encoded, what, ("PNG",), ("1", "L"), size).convert("L"))


def picture_size(encoded: bytes) -> Size | None:
    """Height and width by the header of a JPEG or PNG, without decoding; None for anything else."""
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        width, height = encoded[16:20], encoded[20:24]
        return (int.from_bytes(height, "big"), int.from_bytes(width, "big")) if len(height) == 4 else None
    if encoded[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        # The frame header, any of the kinds of SOF (ISO 10918-1, B.2.2).
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = encoded[place + 5 : place + 7], encoded[place + 7 : place + 9]
            return int.from_bytes(height, "big"), int.from_bytes(width, "big")
        length = int.from_bytes(encoded[place + 2 : place + 4], "big")
        place += 1 if marker == 0xFF else 2 + max(2, length)
    return None


def media_type(encoded: bytes) -> str:
    """What a JPEG or PNG is called elsewhere."""
    return "image/png" if encoded.startswith(b"\x89PNG") else "image/jpeg"


def _decode(
    encoded: bytes, what: str, formats: tuple[str, ...], modes: tuple[str, ...], size: Size | None
) -> Image.Image:
    try:
        declared = picture_size(encoded)
        with contextlib.ExitStack() as stack:
            # Pillow's own limit warns first; ours is below it and an error. Filters are the whole process's:
            # they are not touched for pictures of common sizes, of which several threads decode many.
            if declared is None or declared[0] * declared[1] > MAX_PIXELS:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=formats)
        width, height = image.size
        if size is not None and (height, width) != tuple(size):
            raise DataError(f"{what} has {width}x{height} pixels instead of {size[1]}x{size[0]}")
        if width * height > MAX_PIXELS:
            raise DataError(f"{what} has {width}x{height} pixels, more than the {MAX_PIXELS:,} it may have")
        if image.mode not in modes:
            raise DataError(
                f"{what} has pixels of another kind (mode {image.mode}) than {' or '.join(modes)}"
            )
        if image.format == "PNG":
            _check_sums(encoded)
        image.load()
    except DataError:
        raise
    # What Pillow raises on damaged files is of many kinds, struct.error and IndexError among them.
    except Exception as error:
        raise DataError(f"{what} cannot be decoded ({_reason(error)})") from error
    return image


def _check_sums(png: bytes) -> None:
    """Holds every chunk against its checksum: Pillow passes over those of the pixels.

    Raises:
        ValueError: one differs.
    """
    place = 8
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        end = place + 8 + length
        if struct.unpack_from(">I", png, end)[0] != zlib.crc32(png[place + 4 : end]):
            raise ValueError(f"checksum of its {png[place + 4 : place + 8]!r} chunk")
        if png[place + 4 : place + 8] == b"IEND":
            return
        place = end + 4
    raise ValueError("it is cut")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no picture of a known kind"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class ViewProcessor:
    """Decodes the six views of a record and resizes them to the size that the image processor takes.

    The rest is the device's (`ImageProcessor.view_patches`). Views are prepared side by side, on as many
    threads as there are processors: libjpeg and OpenCV let go of Python.
    """

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

    def __call__(self, record: Record) -> UInt8[np.ndarray, "N H W 3"]:
        """The record's views, 0..255.

        Raises:
            DataError: an image is absent or cannot be decoded.
        """
        views = np.empty((len(CAMERAS), *self.processor.image_size, 3), np.uint8)
        # All of them, so that the first camera's error is raised whichever came first.
        list(_threads().map(functools.partial(self._prepare, record), range(len(CAMERAS)), views))
        return views

    def _prepare(self, record: Record, camera: int, view: UInt8[np.ndarray, "H W 3"]) -> None:
        if not record["images"][camera]:
            raise DataError(
                f"keyframe {record['token']} has no {CAMERAS[camera]} image: it was converted with "
                "--missing-images empty; convert with `render`, or `skip` such keyframes"
            )
        fill_view(record, camera, view, channel_order=self.channel_order)


def fill_view(
    record: Record,
    camera: int,
    view: UInt8[np.ndarray, "H W 3"],
    *,
    channel_order: Literal["rgb", "bgr"] = "rgb",
) -> None:
    """Decodes a camera's picture into a view, resized to its size: what a model or depth network sees.

    Args:
        record: a keyframe that has this picture.
        camera: its index.
        view: to write; contiguous.
        channel_order: of the view.

    Raises:
        DataError: the picture cannot be decoded.
        ConfigError: it was kept at another size than this one.
    """
    what = f"keyframe {record['token']}: the {CAMERAS[camera]} image"
    photo = _photo(record["images"][camera], what)
    size = photo.shape[:2]
    if size != tuple(record["image_size"][camera]):
        check_kept_size((size[0], size[1]), (view.shape[0], view.shape[1]), what)
    _resize(photo, view)
    if channel_order == "bgr":
        cv2.cvtColor(view, cv2.COLOR_RGB2BGR, dst=view)


def _resize(photo: UInt8[np.ndarray, "H W 3"], view: UInt8[np.ndarray, "h w 3"]) -> None:
    """Published: bilinear without antialiasing, whatever the shape. A photo of the view's size is copied."""
    cv2.resize(photo, (view.shape[1], view.shape[0]), dst=view, interpolation=cv2.INTER_LINEAR)


def kept_view(encoded: bytes, size: Size, what: str) -> bytes:
    """A picture as `convert --image-size` keeps it: resized once, as `fill_view` does, without loss.

    PNG with the filter that is undone fastest: it is read as fast as WebP, which takes 0.6 of its bytes, but
    through a decoder that records of strangers need not reach, and stock zlib writes the same bytes on every
    processor (benchmarks/results/input_pipeline.md). A picture that has this size already stays as it is.

    Args:
        encoded: a JPEG or PNG.
        size: (height, width).
        what: what to call it in an error.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        photo = _photo(encoded, what)
    except DataError as error:
        raise DataError(
            f"{error}: fetch it again, or remove it and say with --missing-images what becomes of its "
            "keyframe"
        ) from error
    if photo.shape[:2] == size:
        return encoded
    height, width = size
    view = np.empty((height, width, 3), np.uint8)
    _resize(photo, view)
    # Without a level OpenCV filters by the pixel to the left alone, which is both fast and small enough.
    done, png = cv2.imencode(
        ".png",
        cv2.cvtColor(view, cv2.COLOR_RGB2BGR),
        [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE],
    )
    if not done:
        raise DataError(f"{what} cannot be encoded")
    return png.tobytes()


def check_kept_size(kept: Size, wanted: Size, what: str) -> None:
    """Refuses views that were resized to another size before: resizing them again gives other pixels.

    Args:
        kept: (height, width) they have.
        wanted: (height, width) of the run.
        what: what to call them.

    Raises:
        ConfigError: the two differ.
    """
    if kept != wanted:
        raise ConfigError(
            f"{what}: views are kept at {kept[0]}x{kept[1]} (height x width, by `convert --image-size`) and "
            f"are wanted at {wanted[0]}x{wanted[1]}: set data.image_size (or add-depth's --image-size) to "
            f"what there is, or convert again with --image-size {wanted[0]}x{wanted[1]}, or without for any"
        )


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """For views; those of several samples share them."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="view")


def scaled_intrinsics(
    record: Record, image_size: tuple[int, int] | Int[np.ndarray, "N 2"]
) -> Float[np.ndarray, "N 3 3"]:
    """Intrinsics of the views resized to `image_size` (height, width; of all, or of each), pixels."""
    native = record["image_size"].astype(np.float64)
    rows, columns = (np.broadcast_to(image_size, native.shape) / native).T
    scale = np.stack([columns, rows, np.ones(len(native))], axis=1)
    return record["camera_intrinsics"] * scale[:, :, None]


def picture_intrinsics(record: Record) -> Float[np.ndarray, "N 3 3"]:
    """Intrinsics in pixels of the pictures as they are: the record's own, unless `kept_view` made these."""
    pictures = zip(record["images"], record["image_size"], strict=True)
    return scaled_intrinsics(record, np.array([picture_size(encoded) or size for encoded, size in pictures]))


def check_cameras(names: Sequence[str], field: str) -> None:
    """Refuses a channel name that none of the cameras has.

    Args:
        names: channel names, such as `CAM_FRONT`.
        field: of the config, with dots.

    Raises:
        ConfigError: there is no such camera.
    """
    for name in names:
        if name not in CAMERAS:
            raise ConfigError(f"{field}: there is no camera {name}; cameras: {', '.join(CAMERAS)}")


FOG = 200
"""Grey that fog fades to, of 255."""


@dataclasses.dataclass(frozen=True)
class CameraFault:
    """Bad conditions for the cameras, made on purpose: to see what a model makes of them, in training or, of
    a trained run, in its predictions. Depth is not touched.
    """

    dark: float = 0.0
    """Share of the light that is missing."""
    fog: float = 0.0
    """Share of every pixel that is grey instead."""
    dead: tuple[str, ...] = ()
    """Cameras whose views are black, by channel name (`CAM_FRONT`)."""
    yaw: float = 0.0
    """Degrees by which the calibration says that every camera looks further left than it does."""
    forward: float = 0.0
    """Metres by which it says that every camera stands further ahead."""

    BOUNDS: ClassVar[Bounds] = {"dark": SHARE, "fog": SHARE, "yaw": ANY, "forward": ANY}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "data.cameras")
        check_cameras(self.dead, "data.cameras.dead")

    def views(self, views: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N H W 3"]:
        """What the cameras show under these conditions; the same array where there are none."""
        if self.dark or self.fog:
            lit = (1 - self.fog) * (1 - self.dark) * views + self.fog * (1 - self.dark) * FOG
            views = np.rint(lit).astype(np.uint8)
        if self.dead:
            alive = np.array([name not in self.dead for name in CAMERAS])
            views = np.where(alive[:, None, None, None], views, np.uint8(0))
        return views

    def camera_to_ego(self, poses: Float[np.ndarray, "N 4 4"]) -> Float[np.ndarray, "N 4 4"]:
        """The calibration as it is told; the same array where it is right."""
        if not self.yaw and not self.forward:
            return poses
        cos, sin = exact.cos_sin(np.deg2rad(self.yaw))
        turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        told = poses.copy()
        told[:, :3, :3] = exact.matmul(np.broadcast_to(turn, (len(poses), 3, 3)), poses[:, :3, :3])
        told[:, 0, 3] += self.forward
        return told

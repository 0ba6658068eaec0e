"""nuScenes' two expansions: the CAN bus (pose messages, routes) and the maps, with the basic masks.

A route is the lane centre that a scene drives along, and 50 m around it. The drivable area of a location is
the map expansion's polygons, or the basic map mask where that is missing.

Basic masks are gigapixel PNGs: the largest has 1.2 billion pixels, more than image libraries open by default
and than a worker process should hold. They are read in row bands into a memory-mapped bit array: PNG rows
only depend on the row above, so a band of rows, preceded by the already decoded row above it, is itself a
small valid PNG that any decoder can undo.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import statistics
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np
import shapely
from jaxtyping import Float, UInt8

from data_prep.nuscenes.tables import Metres, Microseconds, Motion, Quaternion, decode_rows
from spacedrive_jax import exact
from spacedrive_jax.data.images import decode_grey
from spacedrive_jax.data.keyframe_map import PolygonMap
from spacedrive_jax.data.route import Route
from spacedrive_jax.errors import DataError, SpaceDriveError
from spacedrive_jax.io import MEBIBYTE, put_in_place, read_bytes, require_regular, say
from spacedrive_jax.json_files import read_json, read_typed

MOST_POSE_BYTES = 256 * MEBIBYTE
"""Twenty seconds of 50 Hz messages have half a megabyte."""
MOST_OFF = 5.0
"""Seconds between most keyframes and the nearest message."""
MOST_ROUTE_BYTES = 16 * MEBIBYTE
"""A kilometre of 0.2 m steps has a fifth of a megabyte."""
EXPANSION_VERSION = (1, 3)
MOST_EXPANSION = 1024 * MEBIBYTE
"""Bytes; the largest official one has 60 MB."""
MASK_RESOLUTION = 0.1
"""Metres per pixel of the basic map masks."""
_ROWS_AT_ONCE = 32
"""Of a raster, so that what is worked out on the way stays in the processor's cache."""


class PoseMessage(msgspec.Struct, frozen=True, gc=False):
    """One message of the vehicle's localisation."""

    utime: Microseconds
    orientation: Quaternion
    accel: Motion
    """m/s^2."""
    rotation_rate: Motion
    """rad/s."""
    vel: Motion
    """m/s."""


def pose_file(dataroot: Path, scene_name: str) -> Path:
    """Where the CAN bus expansion keeps a scene's pose messages."""
    return Path(dataroot) / "can_bus" / f"{scene_name}_pose.json"


def read_pose_messages(
    dataroot: Path, scene_name: str, timestamps_us: Sequence[int] = ()
) -> list[Mapping[str, Any]] | None:
    """Reads the scene's 50 Hz pose messages, or None when the scene has none.

    Some official scenes were recorded without CAN data, and the CAN bus expansion is a separate download.

    Args:
        dataroot: the nuScenes folder.
        scene_name: whose.
        timestamps_us: of the scene's keyframes, which take the messages next to them.

    Raises:
        DataError: the file exists but is not a list of pose messages in time order, a value cannot be, or
            the messages are of another time than the keyframes.
    """
    path = pose_file(dataroot, scene_name)
    if not path.exists():
        return None
    try:
        messages = decode_rows(read_bytes(path, most=MOST_POSE_BYTES), PoseMessage, path, "utime")
    except DataError as error:
        raise DataError(f"not CAN pose messages: {error}; fetch the file again or remove it") from error
    for earlier, later in itertools.pairwise(messages):
        if later.utime < earlier.utime:
            raise DataError(f"{path}: messages are not in time order (utime {later.utime})")
    if messages and timestamps_us:
        first, last = messages[0].utime, messages[-1].utime
        off = statistics.median(max(first - time, time - last, 0) for time in timestamps_us) * 1e-6
        if off > MOST_OFF:
            raise DataError(
                f"{path}: its messages are {off:.4g} s off the keyframes of {scene_name}: is `utime` in "
                "microseconds, and the file of this scene? Fetch it again or remove it"
            )
    return [msgspec.structs.asdict(message) for message in messages] or None


def route_file(dataroot: Path, scene_name: str) -> Path:
    """Where the CAN bus expansion keeps a scene's route."""
    return Path(dataroot) / "can_bus" / f"{scene_name}_route.json"


def read_route(dataroot: Path, scene_name: str) -> Route | None:
    """Reads a scene's route, or None when the scene has none (the expansion is a separate download).

    Raises:
        DataError: the file exists but is not a list of at least two different points.
    """
    path = route_file(dataroot, scene_name)
    if not path.exists():
        return None
    values = read_json(path, most=MOST_ROUTE_BYTES)
    try:
        points = np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise DataError(f"{path} is not a list of [x, y] points in metres; fetch it again or remove it")
    if len(points) < 2 or not (points != points[0]).any():
        raise DataError(f"{path} has no two different points; fetch it again or remove it")
    return Route(points)


class MaskMap:
    """The basic map mask, read through a memory-mapped bit array.

    Pixel (0, 0) is the top left; the global origin is the bottom left corner (devkit `MapMask`).
    """

    source = "mask"

    def __init__(self, cache: Path) -> None:
        self._bits = np.load(cache, mmap_mode="r")

    def raster(
        self, centre: Float[np.ndarray, "2"], yaw: float, extent: float, cells: int
    ) -> UInt8[np.ndarray, "cells cells"]:
        """Looks up the pixel under every cell centre; see `DrivableMap.raster`."""
        pitch = 2 * extent / cells
        offsets = -extent + pitch * (np.arange(cells) + 0.5)
        cos, sin = exact.cos_sin(yaw)
        x_forward, x_left = centre[0] + cos * offsets, sin * offsets
        y_forward, y_left = centre[1] + sin * offsets, cos * offsets
        raster = np.empty((cells, cells), np.uint8)
        for first in range(0, cells, _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            raster[part] = self._bits_at(x_forward[part, None] - x_left, y_forward[part, None] + y_left)
        return raster

    def _bits_at(self, x: Float[np.ndarray, "r c"], y: Float[np.ndarray, "r c"]) -> UInt8[np.ndarray, "r c"]:
        """The mask at global points, metres, which are overwritten; 0 outside."""
        rows, row_bytes = self._bits.shape
        for metres in (x, y):
            np.divide(metres, MASK_RESOLUTION, out=metres)
        np.subtract(rows, y, out=y)
        column, row = (np.rint(pixels, out=pixels).astype(np.int64) for pixels in (x, y))
        whole = column.min() >= 0 and column.max() < 8 * row_bytes and row.min() >= 0 and row.max() < rows
        inside = None
        if not whole:
            inside = (column >= 0) & (column < 8 * row_bytes) & (row >= 0) & (row < rows)
            row, column = np.where(inside, row, 0), np.where(inside, column, 0)
        shift = 7 - (column & 7).astype(np.uint8)
        np.right_shift(column, 3, out=column)
        row *= row_bytes
        row += column
        bits = (self._bits.reshape(-1).take(row) >> shift) & np.uint8(1)
        return bits if inside is None else bits * inside

    def polygons(self, centre: Float[np.ndarray, "2"], yaw: float, extent: float) -> list[shapely.Polygon]:
        """A mask has no polygons."""
        return []


class _Node(msgspec.Struct, gc=False):
    token: str
    x: Metres
    y: Metres


class _Hole(msgspec.Struct):
    node_tokens: list[str]


class _Polygon(msgspec.Struct):
    token: str
    exterior_node_tokens: Annotated[list[str], msgspec.Meta(min_length=3)]
    holes: list[_Hole]


class _DrivableArea(msgspec.Struct):
    polygon_tokens: list[str]


class _Version(msgspec.Struct):
    version: str | float = ""


class _Expansion(msgspec.Struct):
    node: list[_Node]
    polygon: list[_Polygon]
    drivable_area: list[_DrivableArea]


def _read_drivable_polygons(path: Path) -> list[Any]:
    """The polygons of a map expansion's `drivable_area` layer, global metres.

    Raises:
        DataError: the file is no map expansion, or one older than `EXPANSION_VERSION`.
    """
    # The version first: older layers look different, and the reason is then the better message.
    _check_version(path, read_typed(path, _Version, most=MOST_EXPANSION, advice="fetch it again").version)
    layers = read_typed(path, _Expansion, most=MOST_EXPANSION, advice="fetch it again")
    points = {node.token: (node.x, node.y) for node in layers.node}
    try:
        rings: dict[str, Any] = {}
        for row in layers.polygon:
            exterior = [points[token] for token in row.exterior_node_tokens]
            holes = [[points[token] for token in hole.node_tokens] for hole in row.holes]
            rings[row.token] = (exterior, [hole for hole in holes if len(hole) > 2])
        tokens = [token for area in layers.drivable_area for token in area.polygon_tokens]
        polygons = [shapely.Polygon(*rings[token]) for token in tokens]
    except KeyError as error:
        raise DataError(f"{path}: the token {error} is that of no node or polygon; fetch it again") from error
    return [polygon if polygon.is_valid else shapely.make_valid(polygon) for polygon in polygons]


def _check_version(path: Path, version: str | float) -> None:
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    if numbers is None or (int(numbers[1]), int(numbers[2])) < EXPANSION_VERSION:
        found = f"is version {version}" if version != "" else "names no version"
        raise DataError(
            f"{path} {found} of the map expansion; before 1.3, roads were missing or misplaced, and the "
            "devkit refuses it too: unpack nuScenes-map-expansion-v1.3.zip in maps/, or remove the file (the "
            "basic map masks then serve)"
        )


def expansion_file(dataroot: Path, location: str) -> Path:
    """Where the map expansion keeps a location's layers."""
    return Path(dataroot) / "maps" / "expansion" / f"{location}.json"


@functools.lru_cache(maxsize=4)
def open_expansion(path: Path) -> PolygonMap:
    """Reads a map expansion's `drivable_area` layer once per process (four locations exist)."""
    return PolygonMap(_read_drivable_polygons(path))


def prepare_masks(
    dataroot: Path, masks: Sequence[str], cache_folder: Path, report: Callable[[], None]
) -> None:
    """Unpacks each basic map mask into `cache_folder`, one at a time, unless it is there already.

    Args:
        dataroot: the nuScenes folder.
        masks: mask files relative to it.
        cache_folder: where the bit arrays go.
        report: called after each mask.
    """
    cache_folder.mkdir(parents=True, exist_ok=True)
    for mask in masks:
        cache = mask_cache(cache_folder, mask)
        if not cache.is_file():
            cache_mask_bits(Path(dataroot) / mask, cache)
        report()


def mask_cache(cache_folder: Path, mask: str) -> Path:
    """The bit array of a mask file named relative to the dataroot."""
    # Two masks may have one name in different folders.
    return Path(cache_folder) / f"{Path(mask).stem[:64]}-{hashlib.sha256(mask.encode()).hexdigest()[:16]}.npy"


_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BAND_BYTES = 8 << 20
MAX_INFLATION = 1040
"""Deflate makes no more than 1032 bytes of one."""
FOREGROUND = 255
"""Pixel value of the drivable surface."""


def cache_mask_bits(png: Path, cache: Path) -> None:
    """Writes a mask as a `.npy` of packed bits (rows, ceil(columns / 8)), 1 = foreground.

    Memory stays below a few row bands. The file appears under its name only when whole.

    Args:
        png: 8-bit or 1-bit greyscale PNG, not interlaced.
        cache: path of the `.npy` to write.

    Raises:
        DataError: the PNG is damaged or of another kind, or its checksums differ.
    """
    size = require_regular(png)
    partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
    try:
        with png.open("rb") as stream:
            width, height, bit_depth = _read_header(stream, png)
            if height * width * bit_depth > 8 * MAX_INFLATION * size:
                raise DataError(
                    f"{png} declares {width}x{height} pixels, more than its {size:,} bytes can hold; fetch "
                    "it again"
                )
            shape = (height, (width + 7) // 8)
            bits = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
            first = 0
            for band in _bands(stream, png, width, height, bit_depth):
                bits[first : first + len(band)] = np.packbits(band == FOREGROUND, axis=1)
                first += len(band)
            bits.flush()
            del bits
        put_in_place(partial, cache)
    except OSError as error:
        if isinstance(error, SpaceDriveError):
            raise
        raise SpaceDriveError(f"cannot unpack {png} into {cache}: {say(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _read_header(stream: BinaryIO, path: Path) -> tuple[int, int, int]:
    """Reads signature and IHDR; returns width, height and bit depth."""
    header = stream.read(33)
    if header[:8] != _SIGNATURE or header[8:16] != b"\0\0\0\x0dIHDR" or len(header) < 33:
        raise DataError(f"{path} is not a PNG image; fetch it again")
    if struct.pack(">I", zlib.crc32(header[12:29])) != header[29:]:
        raise DataError(f"{path} is damaged (checksum of the header); fetch it again")
    width, height, bit_depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", header[16:29])
    if not (width and height):
        raise DataError(f"{path} has no pixels; fetch it again")
    if colour != 0 or bit_depth not in (1, 8) or interlace:
        raise DataError(
            f"{path}: a map mask must be a greyscale PNG of 1 or 8 bits, not interlaced; this one has colour "
            f"type {colour}, {bit_depth} bits, interlace {interlace}"
        )
    return width, height, bit_depth


def _image_data(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yields the contents of the IDAT chunks after the header in small pieces, and checks all checksums."""
    while True:
        head = stream.read(8)
        if len(head) < 8:
            raise DataError(f"{path} is cut; fetch it again")
        length, kind = struct.unpack(">I4s", head)
        checksum = zlib.crc32(kind)
        while length:
            piece = stream.read(min(length, 1 << 20))
            if not piece:
                raise DataError(f"{path} is cut; fetch it again")
            length -= len(piece)
            checksum = zlib.crc32(piece, checksum)
            if kind == b"IDAT":
                yield piece
        if stream.read(4) != struct.pack(">I", checksum):
            raise DataError(f"{path} is damaged (checksum of its {kind!r} chunk); fetch it again")
        if kind == b"IEND":
            return


def _bands(
    stream: BinaryIO, path: Path, width: int, height: int, bit_depth: int
) -> Iterator[UInt8[np.ndarray, "rows width"]]:
    """Yields all rows, decoded to 0..255, from top to bottom in bands."""
    row_bytes = 1 + (width * bit_depth + 7) // 8  # one filter byte leads each row
    # A band becomes a picture of one byte a pixel.
    band_bytes = max(1, _BAND_BYTES // (row_bytes * 8 // bit_depth)) * row_bytes
    inflate = zlib.decompressobj()
    above = bytes(row_bytes)  # filter 0 and a black row, which is what PNG assumes above the first row
    pending = bytearray()
    remaining = height * row_bytes

    def decode(rows: bytes) -> UInt8[np.ndarray, "rows width"]:
        nonlocal above
        decoded = _decode_rows(above + rows, width, 1 + len(rows) // row_bytes, bit_depth, path)
        last = decoded[-1] if bit_depth == 8 else np.packbits(decoded[-1] > 0)
        above = b"\0" + last.tobytes()
        return decoded[1:]

    try:
        for piece in _image_data(stream, path):
            while piece:
                pending += inflate.decompress(piece, band_bytes - len(pending))
                piece = inflate.unconsumed_tail
                if len(pending) == band_bytes:
                    remaining -= band_bytes
                    if remaining < 0:
                        raise DataError(f"{path} is damaged (more image data than rows); fetch it again")
                    yield decode(bytes(pending))
                    pending.clear()
    except zlib.error as error:
        raise DataError(f"{path} is damaged ({error}); fetch it again") from None
    if len(pending) != remaining:
        raise DataError(
            f"{path} is damaged: it has {len(pending) - remaining:+d} bytes of image data; fetch it again"
        )
    if pending:
        yield decode(bytes(pending))


def _decode_rows(
    filtered: bytes, width: int, height: int, bit_depth: int, path: Path
) -> UInt8[np.ndarray, "height width"]:
    """Undoes the PNG row filters of `height` rows by wrapping them as a PNG of their own."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, bit_depth, 0, 0, 0, 0)
    png = (
        _SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(filtered, 0)) + chunk(b"IEND", b"")
    )
    return decode_grey(png, str(path), (height, width))

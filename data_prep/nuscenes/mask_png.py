"""Basic map masks: gigapixel PNGs, read in row bands into a memory-mapped bit array.

The largest nuScenes mask has 1.2 billion pixels, more than image libraries open by default and than a
worker process should hold. PNG rows only depend on the row above, so a band of rows, preceded by the
already decoded row above it, is itself a small valid PNG that any decoder can undo.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8

from spacedrive_jax.data.images import decode_grey
from spacedrive_jax.errors import DataError, SpaceDriveError
from spacedrive_jax.io import put_in_place, require_regular, say

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

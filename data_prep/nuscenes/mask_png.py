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

import cv2
import numpy as np
from jaxtyping import UInt8

from spacedrive_jax.console import UserError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BAND_BYTES = 8 << 20
FOREGROUND = 255
"""Pixel value of the drivable surface."""


def cache_mask_bits(png: Path, cache: Path) -> None:
    """Writes a mask as a `.npy` of packed bits (rows, ceil(columns / 8)), 1 = foreground.

    Memory stays below a few row bands. The file appears under its name only when whole.

    Args:
        png: 8-bit or 1-bit greyscale PNG, not interlaced.
        cache: path of the `.npy` to write.

    Raises:
        UserError: the PNG is damaged or of another kind.
    """
    partial = cache.with_name(cache.name + ".partial")
    with png.open("rb") as stream:
        width, height, bit_depth = _read_header(stream, png)
        bits = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(height, (width + 7) // 8))
        first = 0
        for band in _bands(stream, png, width, height, bit_depth):
            bits[first : first + len(band)] = np.packbits(band == FOREGROUND, axis=1)
            first += len(band)
        bits.flush()
        del bits
    os.replace(partial, cache)


def _read_header(stream: BinaryIO, path: Path) -> tuple[int, int, int]:
    """Reads signature and IHDR; returns width, height and bit depth."""
    header = stream.read(33)
    if header[:8] != _SIGNATURE or header[12:16] != b"IHDR" or len(header) < 33:
        raise UserError(f"{path} is not a PNG image; fetch it again")
    width, height, bit_depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", header[16:29])
    if colour != 0 or bit_depth not in (1, 8) or interlace:
        raise UserError(
            f"{path}: a map mask must be a greyscale PNG of 1 or 8 bits, not interlaced; this one has colour "
            f"type {colour}, {bit_depth} bits, interlace {interlace}"
        )
    return width, height, bit_depth


def _image_data(stream: BinaryIO) -> Iterator[bytes]:
    """Yields the contents of the IDAT chunks after the header, in pieces of bounded size."""
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        if kind != b"IDAT":
            stream.seek(length + 4, os.SEEK_CUR)
            continue
        while length:
            piece = stream.read(min(length, 1 << 20))
            if not piece:
                return
            length -= len(piece)
            yield piece
        stream.seek(4, os.SEEK_CUR)


def _bands(
    stream: BinaryIO, path: Path, width: int, height: int, bit_depth: int
) -> Iterator[UInt8[np.ndarray, "rows width"]]:
    """Yields all rows, decoded to 0..255, from top to bottom in bands."""
    row_bytes = 1 + (width * bit_depth + 7) // 8  # one filter byte leads each row
    band_bytes = max(1, _BAND_BYTES // row_bytes) * row_bytes
    inflate = zlib.decompressobj()
    above = bytes(row_bytes)  # filter 0 and a black row, which is what PNG assumes above the first row
    pending = bytearray()
    remaining = height * row_bytes

    def decode(rows: bytes) -> UInt8[np.ndarray, "rows width"]:
        nonlocal above
        decoded = _decode_rows(above + rows, width, 1 + len(rows) // row_bytes, bit_depth)
        if decoded is None:
            raise UserError(f"{path} is damaged; fetch it again")
        last = decoded[-1] if bit_depth == 8 else np.packbits(decoded[-1] > 0)
        above = b"\0" + last.tobytes()
        return decoded[1:]

    try:
        for piece in _image_data(stream):
            while piece:
                pending += inflate.decompress(piece, band_bytes - len(pending))
                piece = inflate.unconsumed_tail
                if len(pending) == band_bytes:
                    remaining -= band_bytes
                    yield decode(bytes(pending))
                    pending.clear()
    except zlib.error as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from None
    if len(pending) != remaining:
        raise UserError(f"{path} is truncated: {remaining - len(pending)} bytes of image data are missing")
    if pending:
        yield decode(bytes(pending))


def _decode_rows(
    filtered: bytes, width: int, height: int, bit_depth: int
) -> UInt8[np.ndarray, "height width"] | None:
    """Undoes the PNG row filters of `height` rows by wrapping them as a PNG of their own."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, bit_depth, 0, 0, 0, 0)
    png = (
        _SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(filtered, 0)) + chunk(b"IEND", b"")
    )
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)

"""Pictures of records: whole, of the right kind and size, or an error that names them."""

import io

import numpy as np
import pytest
from PIL import Image

from spacedrive_jax.data.images import MAX_PIXELS, decode_depth, decode_grey, decode_photo
from spacedrive_jax.errors import DataError


def encoded(pixels, kind="JPEG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def photo():
    rows, columns = np.mgrid[0:36, 0:64]
    return np.stack([rows * 5, columns * 3, rows + columns], axis=2).astype(np.uint8)


def test_photo_is_rgb(photo):
    np.testing.assert_array_equal(decode_photo(encoded(photo, "PNG"), "it"), photo)
    assert np.abs(decode_photo(encoded(photo, quality=98), "it", (36, 64)).astype(int) - photo).max() < 12


def test_every_cut_is_an_error(photo):
    """A cut picture never shows pixels, its own or another picture's."""
    whole = encoded(photo)
    for length in range(0, len(whole) - 2, 7):
        with pytest.raises(DataError, match="the view"):
            decode_photo(whole[:length], "the view")


def test_every_flipped_bit_of_a_png_is_an_error():
    whole = encoded(np.arange(2000, dtype=np.uint16).reshape(40, 50), "PNG")
    for place in range(8, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(DataError, match="the depth"):
            decode_depth(bytes(damaged), "the depth")


def test_wrong_size_kind_and_format_are_named(photo):
    with pytest.raises(DataError, match="64x36 pixels instead of 32x18"):
        decode_photo(encoded(photo), "it", (18, 32))
    with pytest.raises(DataError, match="no picture of a known kind"):
        decode_photo(encoded(photo, "BMP"), "it")
    with pytest.raises(DataError, match="mode L"):
        decode_depth(encoded(photo[..., 0], "PNG"), "it")


def test_size_is_checked_before_memory_is_taken():
    side = int(MAX_PIXELS**0.5) + 1
    stream = io.BytesIO()
    Image.new("1", (side, side)).save(stream, "PNG")  # some 8 kB
    with pytest.raises(DataError, match="more than"):
        decode_grey(stream.getvalue(), "it")


def test_depth_is_in_metres():
    depth = np.array([[0, 256, 65535]], np.uint16)
    np.testing.assert_array_equal(decode_depth(encoded(depth, "PNG"), "it"), [[0.0, 1.0, 65535 / 256]])


def test_same_pixels_as_opencv_on_real_photographs(nuscenes_real):
    cv2 = pytest.importorskip("cv2")
    photographs = sorted(nuscenes_real.glob("samples/CAM_*/*.jpg"))
    assert photographs
    for path in photographs:
        data = path.read_bytes()
        other = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(decode_photo(data, path.name), other)

"""Pictures of records: whole, of the right kind and size, or an error that names them."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from spacedrive_jax.data.images import MAX_PIXELS, check_photo, decode_depth, decode_grey, decode_photo
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


def busy_photo(seed=0):
    """Something like a photograph: smooth here, detailed there."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:180, 0:320]
    smooth = np.stack([rows, columns // 2, (rows + columns) // 3], axis=2)
    noise = rng.normal(0, 20, (180, 320, 3)) * (columns > 160)[..., None]
    return encoded(np.clip(smooth + noise, 0, 255).astype(np.uint8), quality=85)


def test_damage_in_the_middle_of_a_photo_is_found():
    whole = busy_photo()
    check_photo(whole, "it")
    check_photo(whole + bytes(16), "it")  # some encoders fill the file up
    rng = np.random.default_rng(1)
    lost, overwritten = [], []
    for start in rng.integers(700, len(whole) - 200, 30).tolist():
        other = rng.integers(0, 255, 128, dtype=np.uint8).tobytes()  # without 0xFF, which Pillow itself notes
        lost.append(is_damaged(whole[:start] + whole[start + 128 :]))
        overwritten.append(is_damaged(whole[:start] + other + whole[start + 128 :]))
    assert sum(lost) >= 27
    assert sum(overwritten) >= 24


def is_damaged(photo):
    with contextlib.suppress(DataError):
        check_photo(photo, "it")
        return False
    return True


@pytest.mark.parametrize("value", [0, 1, 127, 128, 129, 254, 255])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}])
def test_flat_pictures_are_whole(value, options):
    check_photo(encoded(np.full((36, 64, 3), value, np.uint8), **options), "it")


def test_photographs_of_all_sizes_and_kinds_are_whole():
    rng = np.random.default_rng(2)
    for trial in range(60):
        height, width = (int(side) for side in rng.integers(1, 70, 2))
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8) // int(rng.integers(1, 60))
        options = {"quality": int(rng.integers(5, 100)), "progressive": trial % 3 == 0}
        check_photo(encoded(pixels, **options), f"trial {trial}")


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
        check_photo(data, path.name)

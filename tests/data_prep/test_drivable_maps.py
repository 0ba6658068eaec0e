"""Drivable rasters from masks and polygons, and the banded PNG reader."""

import io
import json
import struct
import zlib

import cv2
import numpy as np
import pytest
import shapely
from PIL import Image

from data_prep.nuscenes import expansions
from data_prep.nuscenes.expansions import MaskMap, cache_mask_bits, open_expansion
from spacedrive_jax.data.keyframe_map import map_fields
from spacedrive_jax.errors import DataError, SpaceDriveError
from tests.data_prep.tiny_nuscenes import road_expansion

HALF_PI = np.pi / 2


@pytest.fixture
def mask_map(dataroot, tmp_path):
    cache_mask_bits(dataroot / "maps" / "tiny.png", tmp_path / "tiny.npy")
    return MaskMap(tmp_path / "tiny.npy")


@pytest.fixture
def expansion_map(tmp_path):
    (tmp_path / "town.json").write_text(json.dumps(road_expansion()))
    return open_expansion(tmp_path / "town.json")


def blobs(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(height).random((height, width)).astype(np.float32)
    return np.where(cv2.GaussianBlur(noise, (0, 0), 4) > 0.5, np.uint8(255), np.uint8(0))


@pytest.mark.parametrize("strategy", ["DEFAULT", "FILTERED", "HUFFMAN_ONLY", "RLE", "FIXED"])
@pytest.mark.parametrize("bilevel", [0, 1])
@pytest.mark.parametrize("width", [200, 203])
def test_banded_reader_equals_a_whole_decode(tmp_path, monkeypatch, strategy, bilevel, width):
    image = blobs(157, width)
    options = [cv2.IMWRITE_PNG_STRATEGY, getattr(cv2, f"IMWRITE_PNG_STRATEGY_{strategy}")]
    cv2.imwrite(str(tmp_path / "m.png"), image, [*options, cv2.IMWRITE_PNG_BILEVEL, bilevel])
    monkeypatch.setattr(expansions, "_BAND_BYTES", 3000)
    cache_mask_bits(tmp_path / "m.png", tmp_path / "m.npy")
    bits = np.unpackbits(np.load(tmp_path / "m.npy"), axis=1)[:, :width]
    np.testing.assert_array_equal(bits, image == 255)


@pytest.mark.parametrize("filter_kind", range(5))
def test_every_row_filter_survives_a_band_border(tmp_path, monkeypatch, filter_kind):
    """Rows written with each PNG filter by hand, since encoders choose filters as they like."""
    image = blobs(40, 64).astype(np.int64)
    left = np.pad(image, ((0, 0), (1, 0)))[:, :-1]
    above = np.pad(image, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(image, ((1, 0), (1, 0)))[:-1, :-1]
    estimate = left + above - corner
    distances = np.stack([abs(estimate - left), abs(estimate - above), abs(estimate - corner)])
    paeth = np.choose(distances.argmin(axis=0), [left, above, corner])
    predicted = [0 * image, left, above, (left + above) // 2, paeth][filter_kind]
    rows = np.concatenate([np.full((40, 1), filter_kind), (image - predicted) % 256], axis=1).astype(np.uint8)
    (tmp_path / "m.png").write_bytes(as_png(rows.tobytes(), 64, 40))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "m.png")), image)
    monkeypatch.setattr(expansions, "_BAND_BYTES", 300)
    cache_mask_bits(tmp_path / "m.png", tmp_path / "m.npy")
    np.testing.assert_array_equal(np.unpackbits(np.load(tmp_path / "m.npy"), axis=1), image == 255)


def as_png(rows: bytes, width: int, height: int) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(rows)
    pieces = [chunk(b"IDAT", data[start : start + 50]) for start in range(0, len(data), 50)]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(pieces) + chunk(b"IEND", b"")


def test_damaged_masks_are_refused_and_leave_nothing(tmp_path):
    good = cv2.imencode(".png", blobs(120, 300))[1].tobytes()
    colour = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    corrupt = bytearray(good)
    corrupt[len(good) // 2 : len(good) // 2 + 40] = bytes(40)
    cases = {
        "not a PNG": b"hello",
        "truncated|damaged": good[: len(good) // 2],
        "damaged|truncated": bytes(corrupt),
        "greyscale": colour,
    }
    for message, content in cases.items():
        (tmp_path / "m.png").write_bytes(content)
        with pytest.raises(SpaceDriveError, match=message):
            cache_mask_bits(tmp_path / "m.png", tmp_path / "m.npy")
        assert not (tmp_path / "m.npy").exists()


def test_mask_raster_axes(mask_map):
    # At (105, 100) heading +y (north): the road x in [90, 110) is 15 m to the left and 5 m to the right.
    raster = mask_map.raster(np.array([105.0, 100.0]), HALF_PI, 50.0, 200)
    left = -50 + 0.5 * (np.arange(200) + 0.5)
    np.testing.assert_array_equal(raster, np.broadcast_to((left > -5) & (left < 15), (200, 200)))
    # Heading +x (east) the road lies across: 15 m behind to 5 m ahead.
    raster = mask_map.raster(np.array([105.0, 100.0]), 0.0, 50.0, 200)
    np.testing.assert_array_equal(raster, np.broadcast_to(((left > -15) & (left < 5))[:, None], (200, 200)))


def test_mask_outside_the_map_is_not_drivable(mask_map):
    raster = mask_map.raster(np.array([100.0, 5.0]), HALF_PI, 50.0, 200)
    assert not raster[:88].any()  # more than 5 m behind: south of the map
    assert raster[92:, 95:105].all()


def test_expansion_raster_axes_holes_and_side_road(expansion_map):
    # At (105, 100) heading north: the island is 3..7 m to the left, from 5 m behind to 5 m ahead; the side
    # road begins 15 m to the left.
    raster = expansion_map.raster(np.array([105.0, 100.0]), HALF_PI, 50.0, 200)

    def drivable(forward: float, left: float) -> int:
        return raster[int((forward + 50) * 2), int((left + 50) * 2)]

    assert drivable(0.25, 0.25)
    assert drivable(30.25, 14.25)
    assert drivable(-49.75, -4.25)
    assert not drivable(0.25, 5.25)
    assert not drivable(-4.25, 3.75)
    assert drivable(7.25, 5.25)
    assert drivable(13.25, 30.25), "the side road is on the left, ahead"
    assert not drivable(13.25, -30.25)
    assert not drivable(-13.25, 30.25)


def test_fine_and_coarse_rasters_agree_with_the_polygons(expansion_map):
    centre, yaw = np.array([103.0, 101.0]), 1.2
    fields = map_fields(expansion_map, centre, yaw)
    assert fields["drivable_source"] == "expansion"
    fine = np.asarray(Image.open(io.BytesIO(fields["drivable_fine"])))
    assert (fine.shape, fine.dtype) == ((1000, 1000), np.dtype(bool))
    polygons = [shapely.from_wkb(blob) for blob in fields["drivable_polygons"]]
    area = sum(polygon.area for polygon in polygons)
    assert area == pytest.approx(fine.sum() * 0.01, rel=0.02)
    assert area == pytest.approx(fields["drivable"].sum() * 0.25, rel=0.08)
    cells = np.argwhere(np.ones((50, 50))) * 20 + 10
    points = shapely.points(cells * 0.1 - 50 + 0.05)
    inside = np.any([shapely.contains(polygon, points) for polygon in polygons], axis=0)
    near_border = np.any([shapely.distance(polygon.boundary, points) < 0.15 for polygon in polygons], axis=0)
    np.testing.assert_array_equal(fine[tuple(cells.T)][~near_border], inside[~near_border])


def test_later_polygon_refills_a_hole(tmp_path):
    layers = road_expansion()
    island = next(p for p in layers["polygon"] if p["token"] == "road")["holes"][0]["node_tokens"]
    layers["polygon"].append({"token": "fill", "exterior_node_tokens": island, "holes": []})
    layers["drivable_area"].append({"token": "more", "polygon_tokens": ["fill"]})
    (tmp_path / "town.json").write_text(json.dumps(layers))
    raster = open_expansion(tmp_path / "town.json").raster(np.array([100.0, 100.0]), 0.0, 50.0, 200)
    assert raster[95:105, 95:105].all()


def test_no_map():
    fields = map_fields(None, np.zeros(2), 0.0)
    assert fields["drivable_source"] == "none"
    assert fields["drivable_fine"] == b""
    assert not fields["drivable"].any()


@pytest.mark.parametrize("content", ["{", "{}", '{"node": [], "polygon": [], "drivable_area": [{}]}'])
def test_broken_expansion_is_named(tmp_path, content):
    (tmp_path / "town.json").write_text(content)
    with pytest.raises(SpaceDriveError, match=r"town\.json"):
        open_expansion(tmp_path / "town.json")


def test_every_flipped_bit_of_a_mask_is_an_error(tmp_path):
    """The file's own checksums are held against its bytes, and no decoder sees what fails them."""
    cv2.imwrite(str(tmp_path / "m.png"), blobs(40, 64))
    whole = (tmp_path / "m.png").read_bytes()
    for place in range(0, len(whole) - 12, 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        (tmp_path / "m.png").write_bytes(damaged)
        with pytest.raises(DataError, match=r"m\.png"):
            cache_mask_bits(tmp_path / "m.png", tmp_path / "m.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.png"]


def test_size_of_a_mask_is_held_against_its_bytes(tmp_path):
    cv2.imwrite(str(tmp_path / "m.png"), blobs(40, 64))
    whole = bytearray((tmp_path / "m.png").read_bytes())
    whole[16:24] = struct.pack(">II", 100_000, 100_000)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    (tmp_path / "m.png").write_bytes(whole)
    with pytest.raises(DataError, match="more than its"):
        cache_mask_bits(tmp_path / "m.png", tmp_path / "m.npy")

"""Camera pictures: planned and recorded paths over the front view, and the six views with their depth."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes

from spacedrive_jax.constants import CAMERAS, EGO_WIDTH
from spacedrive_jax.data.schema import Record
from spacedrive_jax.reporting.projection import (
    decode_depth,
    decode_image,
    ground_ribbon,
    lidar_points,
    project,
)
from spacedrive_jax.reporting.run_files import SeenDepth
from spacedrive_jax.reporting.style import PREDICTION, TRUTH, new_figure, rgb, styled, to_png

FRONT = CAMERAS.index("CAM_FRONT")
STRIP_ORDER = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)
OVERLAY_WIDTH = 960
TILE_SIZE = (320, 180)

DEPTH_RANGE_M = (2.0, 60.0)
DEPTH_TICKS_M = (2, 5, 10, 20, 40, 60)
PAPER = (247, 249, 251)


def front_overlay(
    record: Record, waypoints: Float[np.ndarray, "T 2"] | None
) -> UInt8[np.ndarray, "H W 3"] | None:
    """The front view with the recorded and the predicted path laid on the ground; None without pixels.

    The ground is taken as the plane z = 0 of the ego frame, so paths float where the road rises or falls.
    """
    image = decode_image(record, FRONT)
    if image is None:
        return None
    height, width = image.shape[:2]
    scale = OVERLAY_WIDTH / width
    image = cv2.resize(image, (OVERLAY_WIDTH, round(height * scale)), interpolation=cv2.INTER_AREA)
    # Intrinsics belong to the recorded image size, which is that of the bytes.
    if np.all(record["waypoint_mask"]):
        image = _lay_path(image, record, record["waypoints"], scale, TRUTH, fill=0.0)
    if waypoints is not None:
        image = _lay_path(image, record, waypoints, scale, PREDICTION, fill=0.4)
    return image


def _lay_path(
    image: UInt8[np.ndarray, "H W 3"],
    record: Record,
    waypoints: Float[np.ndarray, "T 2"],
    scale: float,
    color: str,
    fill: float,
) -> UInt8[np.ndarray, "H W 3"]:
    """Lays a ribbon as wide as the vehicle on the ground, `fill` opaque, with a dot at each waypoint."""
    borders = [project(side, record, FRONT)[0] * scale for side in ground_ribbon(waypoints, EGO_WIDTH)]
    visible = np.isfinite(borders[0]).all(axis=1) & np.isfinite(borders[1]).all(axis=1)
    left, right = (_to_fixed(border[visible]) for border in borders)
    layer = image.copy()
    if len(left) > 1:
        cv2.fillPoly(layer, [np.concatenate([left, right[::-1]])], rgb(color), cv2.LINE_AA, shift=4)
    blended = cv2.addWeighted(layer, fill, image, 1 - fill, 0)
    for border in (left, right):
        cv2.polylines(blended, [border], False, rgb(color), 2, cv2.LINE_AA, shift=4)
    dots = project(np.pad(waypoints, ((0, 0), (0, 1))), record, FRONT)[0] * scale
    for x, y in dots[np.isfinite(dots).all(axis=1)]:
        if 0 <= x < image.shape[1] and 0 <= y < image.shape[0]:
            cv2.circle(blended, (round(x), round(y)), 5, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(blended, (round(x), round(y)), 4, rgb(color), -1, cv2.LINE_AA)
    return blended


def _to_fixed(points: Float[np.ndarray, "n 2"]) -> np.ndarray:
    """Pixel coordinates with 4 fractional bits, kept in a range OpenCV can clip."""
    return np.round(np.clip(points, -2e4, 2e4) * 16).astype(np.int32)


def depth_source(record: Record, seen: SeenDepth | None = None) -> str:
    """What `camera_strip` shows as depth: `run` (what the run saw), `exact`, `lidar` or `none`."""
    if seen is not None:
        return "run"
    if any(record["exact_depth"]):
        return "exact"
    return "lidar" if record["lidar"] else "none"


def camera_strip(record: Record, seen: SeenDepth | None = None) -> UInt8[np.ndarray, "H W 3"] | None:
    """The six views, front row above back row, each above its depth; None when there are no pixels at all.

    Depth is colored from near (yellow) to far (violet) on a logarithmic scale of 2 to 60 m: a network's that
    the run saw, laid over the views; else the record's exact depth image where it has one, otherwise the
    LiDAR points drawn over the darkened view.
    """
    if not any(record["images"]):
        return None
    source = depth_source(record, seen)
    points = None if any(record["exact_depth"]) else lidar_points(record)
    rows = []
    for names in (STRIP_ORDER[:3], STRIP_ORDER[3:]):
        cameras = [CAMERAS.index(name) for name in names]
        views = [_view(record, camera) for camera in cameras]
        rows.append(
            _row([labelled(view, CAMERAS[camera]) for view, camera in zip(views, cameras, strict=True)])
        )
        if seen is not None:
            depth, sources = seen
            tiles = zip(cameras, views, strict=True)
            rows.append(_row([_seen(depth[camera], view, sources[camera]) for camera, view in tiles]))
        elif source != "none":
            rows.append(
                _row(
                    [
                        _depth(record, camera, view, points)
                        for view, camera in zip(views, cameras, strict=True)
                    ]
                )
            )
    return np.concatenate(rows)


@styled
def depth_scale() -> str:
    """The colours of the depth with their metres, as the data address of a figure."""
    figure, axes = new_figure(4.2, 0.62)
    draw_depth_scale(axes)
    return to_png(figure)


def draw_depth_scale(axes: Axes) -> None:
    """Draws the colours of the depth with their metres into axes."""
    depth = np.geomspace(*DEPTH_RANGE_M, 256)
    axes.imshow(_depth_colors(depth)[None], aspect="auto", extent=(0, 1, 0, 1))
    near, far = np.log(DEPTH_RANGE_M)
    axes.set_xticks((np.log(DEPTH_TICKS_M) - near) / (far - near), [f"{tick} m" for tick in DEPTH_TICKS_M])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _row(tiles: list[np.ndarray]) -> np.ndarray:
    gap = 3
    return np.concatenate(
        [np.pad(t, ((gap, gap), (gap, gap), (0, 0)), constant_values=255) for t in tiles], 1
    )


def _view(record: Record, camera: int) -> UInt8[np.ndarray, "h w 3"]:
    image = decode_image(record, camera)
    if image is None:
        return np.full((TILE_SIZE[1], TILE_SIZE[0], 3), PAPER, np.uint8)
    return cv2.resize(image, TILE_SIZE, interpolation=cv2.INTER_AREA)


def labelled(view: UInt8[np.ndarray, "h w 3"], name: str) -> UInt8[np.ndarray, "h w 3"]:
    """A tile with its camera's name written into it."""
    text = name.removeprefix("CAM_").replace("_", " ").lower()
    for color, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        view = cv2.putText(
            view.copy(), text, (8, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, color, thickness, cv2.LINE_AA
        )
    return view


def _seen(
    depth: Float[np.ndarray, "rows columns"], view: UInt8[np.ndarray, "h w 3"], source: str
) -> UInt8[np.ndarray, "h w 3"]:
    colors = cv2.resize(_depth_colors(depth), TILE_SIZE, interpolation=cv2.INTER_NEAREST)
    return labelled(cv2.addWeighted(colors, 0.7, view, 0.3, 0), source)


def _depth(
    record: Record,
    camera: int,
    view: UInt8[np.ndarray, "h w 3"],
    points: Float[np.ndarray, "n 3"] | None,
) -> UInt8[np.ndarray, "h w 3"]:
    depth = decode_depth(record, camera)
    if depth is not None:
        small = cv2.resize(depth, TILE_SIZE, interpolation=cv2.INTER_NEAREST)
        return np.where(small[..., None] > 0, _depth_colors(small), np.array(PAPER, np.uint8))
    canvas = (view * 0.45).astype(np.uint8)
    if points is None:
        return canvas
    pixels, distance = project(points, record, camera)
    height, width = record["image_size"][camera]
    pixels = pixels * np.array([TILE_SIZE[0] / width, TILE_SIZE[1] / height])
    inside = np.all((pixels >= 0) & (pixels < TILE_SIZE), axis=1)
    far_first = np.flatnonzero(inside)[np.argsort(-distance[inside], kind="stable")]
    colors = _depth_colors(distance[far_first])
    for (x, y), color in zip(pixels[far_first].astype(int), colors, strict=True):
        cv2.circle(canvas, (int(x), int(y)), 1, color.tolist(), -1)
    return canvas


def _depth_colors(depth: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    near, far = np.log(DEPTH_RANGE_M)
    share = (np.log(np.clip(depth, *DEPTH_RANGE_M)) - near) / (far - near)
    return (colormaps["viridis_r"](share)[..., :3] * 255).astype(np.uint8)

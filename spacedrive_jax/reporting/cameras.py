"""What a record shows in its cameras: points, boxes and paths of the ego frame, its images and their depth.

First the projection into a camera, then the pictures: planned and recorded paths over the front view, and the
six views with their depth.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes

from spacedrive_jax import exact
from spacedrive_jax.constants import CAMERAS, EGO_WIDTH
from spacedrive_jax.data import images
from spacedrive_jax.data.images import decode_photo
from spacedrive_jax.data.keyframe import camera_to_ego, ego_to_camera
from spacedrive_jax.data.lidar import sweep_points
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.collision import box_corners
from spacedrive_jax.reporting.figures import PREDICTION, TRUTH, new_figure, rgb, styled, to_png
from spacedrive_jax.reporting.run_files import SeenDepth

MIN_DEPTH_M = 0.5
"""Nothing nearer to a camera is drawn."""
BOX_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
"""Pairs of `upright_corners`."""


def project(
    points: Float[np.ndarray, "n 3"], record: Record, camera: int
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n"]]:
    """Pixel coordinates (x, y at the native image size) and depth in metres of points in the ego frame.

    Pixels of points nearer than 0.5 m, or behind, are nan.
    """
    in_camera = exact.transform(points, ego_to_camera(record, camera))
    depth = in_camera[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = _to_pixels(in_camera, record, camera)
    return np.where(depth[:, None] > MIN_DEPTH_M, pixels, np.nan), depth


def project_segments(
    starts: Float[np.ndarray, "n 3"], ends: Float[np.ndarray, "n 3"], record: Record, camera: int
) -> list[Float[np.ndarray, "2 2"]]:
    """Segments of the ego frame in a camera's image, cut off 0.5 m before it; those behind are left out.

    Args:
        starts: metres, ego frame of the keyframe.
        ends: likewise.
        record: the keyframe.
        camera: index of the camera.

    Returns:
        Two pixel positions (x, y at the native image size) for each segment that is seen.
    """
    to_camera = ego_to_camera(record, camera)
    segments = []
    for start, end in zip(exact.transform(starts, to_camera), exact.transform(ends, to_camera), strict=True):
        if max(start[2], end[2]) < MIN_DEPTH_M:
            continue
        if min(start[2], end[2]) < MIN_DEPTH_M:
            share = (MIN_DEPTH_M - start[2]) / (end[2] - start[2])
            cut = start + share * (end - start)
            start, end = (cut, end) if start[2] < MIN_DEPTH_M else (start, cut)
        segments.append(_to_pixels(np.stack([start, end]), record, camera))
    return segments


def _to_pixels(in_camera: Float[np.ndarray, "n 3"], record: Record, camera: int) -> Float[np.ndarray, "n 2"]:
    image = exact.rotate(in_camera, np.asarray(record["camera_intrinsics"][camera]))
    return image[:, :2] / image[:, 2:]


def upright_corners(boxes: Float[np.ndarray, "A 7"]) -> Float[np.ndarray, "A 8 3"]:
    """Corners of upright boxes: four at the bottom from front left clockwise, then four at the top.

    Args:
        boxes: x y z length width height yaw, centre, as `agent_boxes` of a record.
    """
    ground = box_corners(boxes[:, :2], boxes[:, 6], boxes[:, 3:5])
    heights = boxes[:, 2, None] + boxes[:, 5, None] / 2 * np.array([-1, 1])
    levels = [
        np.concatenate([ground, np.repeat(height[:, None, None], 4, axis=1)], axis=2) for height in heights.T
    ]
    return np.concatenate(levels, axis=1)


def decode_image(record: Record, camera: int) -> UInt8[np.ndarray, "H W 3"] | None:
    """The camera's RGB image at its native size, or None when the record has no pixels for it.

    Raises:
        DataError: it is damaged.
    """
    if not record["images"][camera]:
        return None
    image = decode_photo(record["images"][camera], f"keyframe {record['token']}: the {CAMERAS[camera]} image")
    height, width = (int(side) for side in record["image_size"][camera])
    if image.shape[:2] != (height, width):  # kept at the size of training
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def decode_depth(record: Record, camera: int) -> Float[np.ndarray, "H W"] | None:
    """The exact depth image in metres, 0 where unknown, or None when the record has none."""
    data = record["exact_depth"][camera]
    what = f"keyframe {record['token']}: the {CAMERAS[camera]} depth"
    return images.decode_depth(data, what) if data else None


def lidar_points(record: Record) -> Float[np.ndarray, "n 3"] | None:
    """The sweep's points in the ego frame of the keyframe, metres, or None without a sweep."""
    if not record["lidar"]:
        return None
    points = sweep_points(record)
    return exact.transform(points, record["lidar_to_ego"])


def ground_ribbon(
    waypoints: Float[np.ndarray, "T 2"], width: float, spacing: float = 0.25
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"]]:
    """Left and right border, on the ground, of the strip a vehicle sweeps along the waypoints.

    Args:
        waypoints: metres, ego frame; the path starts at the origin.
        width: width of the strip in metres.
        spacing: distance between neighbouring border points in metres.
    """
    path = np.concatenate([np.zeros((1, 2)), waypoints])
    length = np.concatenate([[0.0], exact.norm(np.diff(path, axis=0)).cumsum()])
    at = np.linspace(0.0, length[-1], max(int(length[-1] / spacing), 1) + 1)
    # np.interp wants distinct positions: a vehicle at rest repeats its waypoint.
    keep = np.concatenate([[True], np.diff(length) > 1e-6])
    centre = np.stack([np.interp(at, length[keep], path[keep, axis]) for axis in range(2)], axis=1)
    tangent = np.gradient(centre, axis=0) if len(centre) > 1 else np.zeros_like(centre)
    norm = exact.norm(tangent)[:, None]
    tangent = np.divide(tangent, norm, out=np.tile([1.0, 0.0], (len(centre), 1)), where=norm > 1e-9)
    offset = width / 2 * np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)
    left, right = (np.pad(centre + side * offset, ((0, 0), (0, 1))) for side in (1, -1))
    return left, right


FARTHEST = 80.0
"""Points farther away are left out, metres."""
LIDAR_COLOUR = (255, 64, 64)


def keyframe_points(
    record: Record, full_depth: tuple[bytes, ...] | None = None
) -> tuple[Float[np.ndarray, "P 3"], UInt8[np.ndarray, "P 3"]]:
    """Every pixel with depth as a point, and the LiDAR sweep in red.

    Args:
        record: the keyframe.
        full_depth: a network's depth of every view (`CachedDepth.full`); None takes the exact depth of drawn
            views.

    Returns:
        Points in the ego frame at the keyframe, metres, and their colours, RGB.

    Raises:
        DataError: the keyframe has neither depth of every pixel nor a sweep.
    """
    points, colours = [], []
    encoded = record["exact_depth"] if full_depth is None else full_depth
    for camera, png in enumerate(encoded):
        if not png or not record["images"][camera]:
            continue
        what = f"keyframe {record['token']}: the {CAMERAS[camera]}"
        depth = images.decode_depth(png, f"{what} depth")
        image = decode_photo(record["images"][camera], f"{what} image")
        image = cv2.resize(image, depth.shape[::-1], interpolation=cv2.INTER_AREA)
        native = record["image_size"][camera]
        scale = np.array([depth.shape[1] / native[1], depth.shape[0] / native[0], 1.0])
        intrinsics = record["camera_intrinsics"][camera] * scale[:, None]
        row, column = np.nonzero((depth > 0) & (depth < FARTHEST))
        pixels = np.stack([column + 0.5, row + 0.5, np.ones(len(row))], axis=1)
        in_camera = exact.rotate(pixels, exact.inverse_3x3(intrinsics)) * depth[row, column, None]
        points.append(exact.transform(in_camera, camera_to_ego(record, camera)))
        colours.append(image[row, column])
    if record["lidar"]:
        sweep = sweep_points(record)
        to_ego = record["lidar_to_ego"]
        points.append(exact.transform(sweep, to_ego))
        colours.append(np.tile(np.array(LIDAR_COLOUR, np.uint8), (len(sweep), 1)))
    if not points:
        raise DataError(
            f"keyframe {record['token']} has no depth of every pixel and no LiDAR: `add-depth --full` adds it"
        )
    return np.concatenate(points), np.concatenate(colours)


def has_points(record: Record) -> bool:
    """Whether a keyframe has depth of every pixel, or a sweep."""
    return bool(record["lidar"]) or any(map(bool, record["exact_depth"]))


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

"""Depth, coverage and echoes on geometry whose answer is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from spacedrive_jax.world import ground, sensors, stage
from spacedrive_jax.world.render import GROUND, NEAR, SKY, Camera, cast, depth_image, in_view
from spacedrive_jax.world.shading import WEATHERS, Light
from spacedrive_jax.world.shapes import Quads, blocks_of, box, concatenate, object_quads, place, place_all
from spacedrive_jax.world.stage import Backdrop, MovingShadows, Participant

FOCAL, WIDTH, HEIGHT, LEVEL = 100.0, 160, 90, 1.5
FORWARD = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
"""Rotation of a camera that looks along global x."""


@pytest.fixture
def camera() -> Camera:
    pose = np.eye(4)
    pose[:3, :3], pose[2, 3] = FORWARD, LEVEL
    return Camera(np.array([[FOCAL, 0, 80.0], [0, FOCAL, 45.0], [0, 0, 1]]), pose, HEIGHT, WIDTH)


def block(x: float, y: float, size: tuple[float, float, float], yaw: float = 0.0, group: int = -1) -> Quads:
    return place(box((0, 0, size[2] / 2), size, (0.5, 0.5, 0.5)), np.array([x, y, 0.0]), yaw, group)


def test_ground_depth_is_that_of_the_plane(camera: Camera) -> None:
    buffer = cast(concatenate([]), camera)
    rows = np.arange(50, HEIGHT)
    assert np.allclose(1 / buffer.inverse_depth[rows, 80], LEVEL * FOCAL / (rows - 45.0), rtol=1e-5)
    assert (buffer.surface[:45] == SKY).all()
    assert (buffer.surface[47:] == GROUND).all()
    assert (depth_image(buffer)[:45] == 0).all()


def test_facing_box_has_the_depth_and_the_outline_of_its_front(camera: Camera) -> None:
    buffer = cast(block(11.0, 0.0, (2.0, 4.0, 3.0)), camera)
    seen = buffer.surface >= 0
    assert np.allclose(1 / buffer.inverse_depth[seen & (np.arange(HEIGHT) > 32)[:, None]], 10.0, rtol=1e-5)
    columns = np.flatnonzero(seen[45])
    assert (columns[0], columns[-1]) == (60, 100)  # 80 -+ 100 * 2 / 10, edges included
    rows = np.flatnonzero(seen[:, 80])
    assert (rows[0], rows[-1]) == (30, 59)  # 1.5 m above eye level to the foot, whose row 60 is the ground's


def test_turned_box_matches_a_ray_and_slab_intersection(camera: Camera) -> None:
    yaw, size = 0.6, (4.0, 2.0, 1.6)
    buffer = cast(block(12.0, 1.5, size, yaw), camera)
    rays = np.moveaxis(camera.rays(), 0, -1).astype(np.float64)
    cos, sin = np.cos(yaw), np.sin(yaw)
    to_box = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    origin = to_box @ (np.array([0, 0, LEVEL]) - np.array([12.0, 1.5, size[2] / 2]))
    directions = rays @ to_box.T
    with np.errstate(divide="ignore"):
        near, far = (
            np.sort([(s * np.array(size) / 2 - origin) / directions for s in (-1, 1)], axis=0)
        ).tolist()
    enter, leave = np.max(near, axis=-1), np.min(far, axis=-1)
    hit = enter < leave - 1e-3
    assert 100 < hit.sum() < 3000
    assert np.allclose(1 / buffer.inverse_depth[hit], enter[hit], rtol=1e-4)
    assert (buffer.surface[leave < enter - 1e-3] < 0).all()


def test_box_behind_and_around_the_camera(camera: Camera) -> None:
    assert (cast(block(-10.0, 0.0, (2.0, 4.0, 3.0)), camera).surface < 0).all()
    beside = cast(block(0.0, 3.0, (40.0, 2.0, 4.0)), camera)  # a wall from behind the camera to 20 m ahead
    left = np.arange(0, 60)
    assert np.allclose(1 / beside.inverse_depth[45, left], 2.0 * FOCAL / (80.0 - left), rtol=1e-4)


def test_hidden_objects_cover_pixels_but_are_not_seen(camera: Camera) -> None:
    scene = concatenate([block(10.0, 0.0, (1.0, 6.0, 4.0), 0, 0), block(20.0, 0.0, (1.0, 2.0, 1.5), 0, 1)])
    buffer = cast(scene, camera)
    groups = np.append(scene.groups, [-1, -1])[buffer.surface]
    assert buffer.covered[1] > 40
    assert (groups == 1).sum() == 0
    assert (groups == 0).sum() == buffer.covered[0]


def crowd(seed: int) -> Quads:
    """Boxes everywhere, some around the near plane, some behind the camera, some behind others."""
    rng = np.random.default_rng(seed)
    objects = [box((0, 0, 0.8), tuple(rng.uniform(0.3, 3.0, 3)), (0.5, 0.5, 0.5)) for _ in range(60)]
    spots = np.column_stack([rng.uniform(-8, 40, 60), rng.uniform(-15, 15, 60), rng.uniform(-1, 2, 60)])
    return place_all(objects, spots, rng.uniform(-4, 4, 60))


def meetings(quads: Quads, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """(Q, R) inverse ray parameter at which each ray meets the front of each quad; 0 where it does not."""
    corners = quads.vertices - origin
    normals = np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
    distance = (normals * corners[:, 0]).sum(axis=1, keepdims=True)
    inverse = normals @ rays.T / distance
    edges = np.cross(corners, np.roll(corners, -1, axis=1))
    sides = np.einsum("qkc,rc->kqr", edges, rays) / np.abs(edges).sum(axis=-1).T[..., None]
    inside = (sides <= 1e-12).all(axis=0) | (sides >= -1e-12).all(axis=0)
    return np.where(inside & (distance < 0) & (inverse > 0), inverse, 0.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_cast_agrees_with_one_ray_per_pixel(camera: Camera, seed: int) -> None:
    quads = crowd(seed)
    buffer = cast(quads, camera)
    rays = camera.rays().reshape(3, -1).T.astype(np.float64)
    position = camera.camera_to_global[:3, 3]
    inverse = meetings(quads, position, rays)
    inverse[inverse >= 1 / NEAR] = 0.0
    ground = np.maximum(-rays[:, 2] / position[2], 0)
    expected = np.maximum(inverse.max(axis=0), ground)
    agrees = np.isclose(buffer.inverse_depth.ravel(), expected, rtol=1e-4, atol=2e-4)
    assert agrees.mean() > 0.9995  # a pixel centre may lie on an edge
    covered = [int((inverse[quads.groups == group] > 0).any(axis=0).sum()) for group in range(60)]
    assert np.allclose([buffer.covered.get(group, 0) for group in range(60)], covered, atol=2)
    assert sum(count > 20 for count in covered) > 10


def test_lidar_agrees_with_one_ray_per_beam() -> None:
    quads = crowd(2)
    sensor = np.eye(4)
    sensor[:3, 3] = 1.0, -2.0, 1.84
    cloud = sensors.lidar_sweep(quads, sensor, np.random.default_rng(0)).astype(np.float64)
    reach = np.linalg.norm(cloud[:, :3], axis=1)
    rays = cloud[:, :3] / reach[:, None]
    inverse = meetings(quads, sensor[:3, 3], rays)
    inverse[inverse >= 1 / sensors.LIDAR_MIN_RANGE] = 0.0
    expected = np.maximum(inverse.max(axis=0), -rays[:, 2] / 1.84)
    agrees = np.abs(1 / expected - reach) < 6 * sensors.LIDAR_NOISE
    assert agrees.mean() > 0.999
    assert (expected > 1.2 * np.maximum(-rays[:, 2] / 1.84, 0)).sum() > 2000  # many beams end on boxes


def test_objects_are_placed_together_as_one_by_one() -> None:
    objects = [object_quads("vehicle.car", (4.5, 1.8, 1.6), "a"), box((0, 0, 0), (1, 2, 3), (1.0, 0.0, 0.0))]
    positions, yaws = np.array([[1.0, 2.0, 0.8], [-5.0, 3.0, 1.5]]), np.array([0.4, -2.0])
    together = place_all(objects, positions, yaws)
    single = concatenate([place(*each) for each in zip(objects, positions, yaws, (0, 1), strict=True)])
    assert np.allclose(together.vertices, single.vertices)
    assert np.array_equal(together.groups, single.groups)
    assert np.array_equal(together.colours, single.colours)
    assert len(place_all([], np.zeros((0, 3)), np.zeros(0))) == 0


def test_lidar_hits_the_box_at_its_face_and_counts_inside() -> None:
    sensor = np.eye(4)
    sensor[2, 3] = 1.84
    quads = block(11.0, 0.0, (2.0, 4.0, 3.0))
    cloud = sensors.lidar_sweep(quads, sensor, np.random.default_rng(0))
    points = cloud[:, :3].astype(np.float64)
    front = (np.abs(np.arctan2(points[:, 1], points[:, 0])) < 0.15) & (points[:, 2] > -1.5)
    front &= points[:, 0] < 30
    assert front.sum() > 100
    assert np.abs(points[front, 0] - 10.0).max() < 6 * sensors.LIDAR_NOISE
    ground = points[:, 2] < -1.7
    assert np.abs(points[ground, 2] + 1.84).max() < 6 * sensors.LIDAR_NOISE
    behind = (np.abs(points[:, 1]) < 1.0) & (points[:, 0] > 12.5) & (points[:, 2] < 0.3)
    assert not behind.any()
    counts = sensors.count_inside(
        cloud,
        sensor,
        np.array([[11.0, 0, 1.6], [-11.0, 0, 1.6]]),
        np.array([[2.2, 4.2, 3.0]] * 2),
        np.zeros(2),
    )
    assert counts[0] > front.sum()
    assert counts[1] == 0


def test_lidar_beams_lie_on_the_rings() -> None:
    sensor = np.eye(4)
    sensor[2, 3] = 1.84
    cloud = sensors.lidar_sweep(block(11.0, 0.0, (2.0, 4.0, 3.0)), sensor, np.random.default_rng(0))
    elevation = np.degrees(np.arctan2(cloud[:, 2], np.hypot(cloud[:, 0], cloud[:, 1])))
    assert np.abs(elevation - sensors.LIDAR_ELEVATIONS[cloud[:, 4].astype(int)]).max() < 1e-3


@pytest.mark.parametrize(
    "category",
    [
        "vehicle.car",
        "vehicle.truck",
        "vehicle.trailer",
        "vehicle.bus.rigid",
        "vehicle.construction",
        "vehicle.emergency.police",
        "vehicle.motorcycle",
        "vehicle.bicycle",
        "human.pedestrian.adult",
        "human.pedestrian.construction_worker",
        "animal",
        "movable_object.barrier",
        "movable_object.trafficcone",
        "movable_object.debris",
        "static_object.bicycle_rack",
    ],
)
def test_objects_stay_inside_their_boxes_and_keep_their_look(category: str) -> None:
    size = {"vehicle": (4.6, 1.9, 1.7), "human": (0.7, 0.7, 1.7)}.get(category.split(".")[0], (1.0, 1.2, 1.0))
    if category in ("vehicle.motorcycle", "vehicle.bicycle"):
        size = (2.0, 0.8, 1.6)
    if category == "static_object.bicycle_rack":
        size = (5.0, 1.6, 1.1)
    quads = object_quads(category, size, "token")
    assert (np.abs(quads.vertices).max(axis=(0, 1)) <= np.array(size) / 2 + 1e-9).all()
    extent = quads.vertices.max(axis=(0, 1)) - quads.vertices.min(axis=(0, 1))
    assert (extent > 0.4 * np.array(size)).all()
    assert np.array_equal(quads.colours, object_quads.__wrapped__(category, size, "token").colours)


def backdrop(seed: int) -> Backdrop:
    """Boxes around the camera on grass and road."""
    rng = np.random.default_rng(seed)
    parts = [
        block(*rng.uniform(-30, 30, 2), tuple(rng.uniform(0.5, 4.0, 3)), rng.uniform(-3, 3))
        for _ in range(80)
    ]
    classes = rng.integers(0, 7, (600, 600)).astype(np.uint8)
    surface_map = ground.SurfaceMap(classes, (-30.0, -30.0), 0.1)
    shadows = rng.integers(0, 200, classes.shape).astype(np.uint8)
    return Backdrop(surface_map, ground.ground_colours(surface_map), blocks_of(parts), shadows)


def crowd_of(seed: int, count: int) -> list[Participant]:
    """Cars around the camera."""
    rng = np.random.default_rng(seed)
    poses = np.column_stack([rng.uniform(-25, 25, (count, 2)), rng.uniform(-4, 4, count)])
    return [
        Participant(str(i), "vehicle.car", (4.5, 1.8, 1.6), tuple(pose), 0.0, False, "")
        for i, pose in enumerate(poses.tolist())
    ]


@pytest.mark.parametrize("turn", [0.0, 2.0])
def test_what_no_view_shows_is_left_out_without_a_trace(camera: Camera, turn: float) -> None:
    """A picture is the same, byte for byte, as of everything there is and of what may be seen of it."""
    pose = camera.camera_to_global.copy()
    cos, sin = np.cos(turn), np.sin(turn)
    pose[:3, :3] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ FORWARD
    camera = Camera(camera.intrinsics, pose, HEIGHT, WIDTH)
    land, light = backdrop(3), Light(WEATHERS[2], 0.5)
    moving, still = MovingShadows(land, light), crowd_of(4, 30)
    tokens = [f"token{i}" for i in range(30)]
    signals = blocks_of([block(8.0, 2.0, (0.3, 0.3, 5.0)), block(-8.0, 2.0, (0.3, 0.3, 5.0))])
    everything = stage.frame_quads(land, still, tokens, signals)
    some = stage.frame_quads(land, still, tokens, signals, camera)
    assert len(some) < 0.7 * len(everything)
    assert some.numbers is not None
    assert np.array_equal(some.vertices, everything.vertices[some.numbers])
    assert np.array_equal(some.groups, everything.groups[some.numbers])
    moving.draw(crowd_of(5, 30), camera)  # an earlier image leaves nothing behind
    for people in ([], still):
        whole = stage.frame_shadows(land, people, light)
        pictures = [
            stage.take_picture(land, quads, shadows, camera, light, 1)
            for quads, shadows in ((everything, whole), (some, moving.draw(people, camera)))
        ]
        assert pictures[0].jpeg == pictures[1].jpeg
        assert pictures[0].depth_png == pictures[1].depth_png
        assert pictures[0].buffer.covered == pictures[1].buffer.covered


def test_boxes_are_in_view_until_they_are_wholly_beside_it(camera: Camera) -> None:
    """The view's left side at 10 m is 8.05 m to the left: half a pixel beyond the first."""
    centres = np.array([[10.0, 8.0, 1.5], [10.0, 8.55, 1.5], [10.0, 8.7, 1.5], [-10.0, 0.0, 1.5]])
    half = np.array([0.0, 0.5, 0.5])
    sides = in_view(centres - half, centres + half, camera)
    assert sides.tolist() == [True, True, False, False]

"""The nuScenes v1.0 tables and map files of the synthetic world.

Of the 13 tables the fixed ones are written out here, the others are gathered from the scenes. A town's maps
are the basic drivable mask and a map expansion (v1.3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.io import write_bytes, write_text
from spacedrive_jax.json_files import to_json
from spacedrive_jax.world import ground, paths
from spacedrive_jax.world.ground import SurfaceMap, polygons_of
from spacedrive_jax.world.scenario import make_token
from spacedrive_jax.world.sensors import CAMERA_MOUNTS, lidar_to_ego, quaternion
from spacedrive_jax.world.town import LANE_WIDTH, PARKING_WIDTH, STOP_SETBACK, TOWN_EDGE, Lane, Town

VERSION = "v1.0-synthetic"
Row = dict[str, Any]

TABLES = (
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
)

CATEGORIES = (
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.wheelchair",
    "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.construction_worker",
    "animal",
    "vehicle.car",
    "vehicle.motorcycle",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.truck",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.trailer",
    "movable_object.barrier",
    "movable_object.trafficcone",
    "movable_object.pushable_pullable",
    "movable_object.debris",
    "static_object.bicycle_rack",
)
"""The 23 official names in the order of the official table."""

ATTRIBUTES = {
    "vehicle.moving": "Vehicle is moving.",
    "vehicle.stopped": "Vehicle, with a driver/rider in/on it, is stationary but has an intent to move.",
    "vehicle.parked": "Vehicle is stationary with no immediate intent to move.",
    "cycle.with_rider": "There is a rider on the bicycle or motorcycle.",
    "cycle.without_rider": "There is no rider on the bicycle or motorcycle.",
    "pedestrian.sitting_lying_down": "The human is sitting or lying down.",
    "pedestrian.standing": "The human is standing.",
    "pedestrian.moving": "The human is moving.",
}

_VISIBILITY = (("1", 0, 40), ("2", 40, 60), ("3", 60, 80), ("4", 80, 100))


def fixed_tables(seed: int, image_size: tuple[int, int]) -> dict[str, list[Row]]:
    """Category, attribute, visibility, sensor and calibrated_sensor.

    Args:
        seed: of the whole data set; part of every token.
        image_size: height and width of the images, pixels; the intrinsics refer to it.
    """
    sensors: list[Row] = []
    calibrations: list[Row] = []
    poses = [(mount.channel, mount.to_ego(), mount.intrinsics(image_size)) for mount in CAMERA_MOUNTS]
    for channel, to_ego, intrinsics in poses:
        sensors.append(
            {"token": make_token(seed, "sensor", channel), "channel": channel, "modality": "camera"}
        )
        calibrations.append(_calibration(seed, channel, to_ego, intrinsics.tolist()))
    sensors.append(
        {"token": make_token(seed, "sensor", "LIDAR_TOP"), "channel": "LIDAR_TOP", "modality": "lidar"}
    )
    calibrations.append(_calibration(seed, "LIDAR_TOP", lidar_to_ego(), []))
    return {
        "category": [
            {"token": make_token(seed, "category", name), "name": name, "description": f"{name} (synthetic)."}
            for name in CATEGORIES
        ],
        "attribute": [
            {"token": make_token(seed, "attribute", name), "name": name, "description": text}
            for name, text in ATTRIBUTES.items()
        ],
        "visibility": [
            {
                "description": f"visibility of whole object is between {low} and {high}%",
                "token": token,
                "level": f"v{low}-{high}",
            }
            for token, low, high in _VISIBILITY
        ],
        "sensor": sensors,
        "calibrated_sensor": calibrations,
    }


def _calibration(seed: int, channel: str, to_ego: Any, intrinsics: list) -> Row:
    return {
        "token": make_token(seed, "calibrated_sensor", channel),
        "sensor_token": make_token(seed, "sensor", channel),
        "translation": [float(value) for value in to_ego[:3, 3]],
        "rotation": quaternion(to_ego),
        "camera_intrinsic": intrinsics,
    }


def visibility_token(visible: int, covered: int) -> str:
    """The level of `visible` pixels out of `covered` that the object would fill in all six images."""
    fraction = visible / covered if covered else 0.0
    return next(token for token, _, high in _VISIBILITY if fraction <= high / 100 or high == 100)


def link(rows: list[Row]) -> None:
    """Fills `prev` and `next` of rows in time order, in place."""
    for row, previous, following in zip(rows, [None, *rows], [*rows[1:], None], strict=False):
        row["prev"] = previous["token"] if previous else ""
        row["next"] = following["token"] if following else ""


def write_tables(root: Path, tables: dict[str, list[Row]]) -> None:
    """Writes all 13 tables as JSON under `root / VERSION`."""
    folder = root / VERSION
    for name in TABLES:
        write_text(folder / f"{name}.json", to_json(tables[name], indent=0))


MASK_RESOLUTION = 0.1
"""Metres per pixel of the basic mask, as in nuScenes."""


def write_mask(town: Town, path: Path) -> None:
    """Writes the semantic prior: 255 where drivable; image row 0 is the top, the largest y."""
    cells = round(TOWN_EDGE / MASK_RESOLUTION)
    canvas = SurfaceMap(np.zeros((cells, cells), dtype=np.uint8), (0.0, 0.0), MASK_RESOLUTION)
    ground.rasterise(town.drivable, canvas, canvas.classes, 255)
    _, png = cv2.imencode(".png", canvas.classes[::-1])
    write_bytes(path, png.tobytes())


def write_expansion(town: Town, seed: int, path: Path) -> None:
    """Writes the vector map that the devkit's NuScenesMap reads."""
    write_text(path, to_json(_Expansion(town, seed).build(), separators=(",", ":")))


class _Expansion:
    """Collects the layers of one map; nodes, lines and polygons get tokens in order of creation."""

    def __init__(self, town: Town, seed: int) -> None:
        self.town, self.seed = town, seed
        names = [
            "polygon",
            "line",
            "node",
            "drivable_area",
            "road_segment",
            "road_block",
            "lane",
            "ped_crossing",
            "walkway",
            "stop_line",
            "carpark_area",
            "road_divider",
            "lane_divider",
            "traffic_light",
            "lane_connector",
        ]
        self.layers: dict[str, list[Row]] = {name: [] for name in names}

    def token(self, layer: str, name: object) -> str:
        return make_token(self.seed, self.town.location, layer, name)

    def add(self, layer: str, fields: Row, name: object = None) -> str:
        rows = self.layers[layer]
        token = self.token(layer, len(rows) if name is None else name)
        rows.append({"token": token, **fields})
        return token

    def nodes(self, points: Any) -> list[str]:
        return [self.add("node", {"x": round(float(x), 4), "y": round(float(y), 4)}) for x, y in points]

    def line(self, points: Any) -> str:
        return self.add("line", {"node_tokens": self.nodes(points)})

    def polygon(self, polygon: shapely.Polygon) -> str:
        holes = [{"node_tokens": self.nodes(hole.coords[:-1])} for hole in polygon.interiors]
        return self.add(
            "polygon", {"exterior_node_tokens": self.nodes(polygon.exterior.coords[:-1]), "holes": holes}
        )

    def build(self) -> dict[str, Any]:
        town = self.town
        areas = [self.polygon(polygon) for polygon in polygons_of(town.drivable)]
        area = self.add("drivable_area", {"polygon_tokens": areas})
        segments = self._road_segments(area)
        for polygon in polygons_of(town.sidewalk):
            self.add("walkway", {"polygon_token": self.polygon(polygon)})
        crossings: dict[tuple[int, int], str] = {}
        for crossing in town.crossings:
            fields = {
                "polygon_token": self.polygon(shapely.Polygon(crossing.polygon)),
                "road_segment_token": segments[crossing.road],
            }
            crossings[(crossing.junction, crossing.arm)] = self.add("ped_crossing", fields)
        for lane in town.lanes.values():
            self._lane(lane, crossings)
        connectivity = {
            self._lane_token(lane): {
                "incoming": [
                    self._lane_token(other) for other in town.lanes.values() if lane.key in other.successors
                ],
                "outgoing": [self._lane_token(town.lanes[key]) for key in lane.successors],
            }
            for lane in town.lanes.values()
        }
        arcs = {self._lane_token(lane): arcline_path(lane.centre) for lane in town.lanes.values()}
        return {
            "version": "1.3",
            "canvas_edge": [TOWN_EDGE, TOWN_EDGE],
            **self.layers,
            "arcline_path_3": arcs,
            "connectivity": connectivity,
        }

    def _road_segments(self, area: str) -> list[str]:
        """Road segments, road blocks, dividers and parking strips of every road; junction segments."""
        town, segments = self.town, []
        for road in town.roads:
            body = shapely.LineString(road.centre).buffer(road.half_width, cap_style="flat")
            fields = {
                "polygon_token": self.polygon(polygons_of(body)[0]),
                "is_intersection": False,
                "drivable_area_token": area,
            }
            segment = self.add("road_segment", fields)
            segments.append(segment)
            self.add(
                "road_divider", {"line_token": self.line(road.centre[::2]), "road_segment_token": segment}
            )
            for side in (-1.0, 1.0):
                edge = paths.offset(road.centre, side * road.lanes * LANE_WIDTH)
                outline = np.concatenate([road.centre, edge[::-1]])
                block = self.add(
                    "road_block",
                    {
                        "polygon_token": self.polygon(shapely.Polygon(outline)),
                        "from_edge_line_token": self.line([road.centre[0], edge[0]]),
                        "to_edge_line_token": self.line([road.centre[-1], edge[-1]]),
                        "road_segment_token": segment,
                    },
                )
                for index in range(1, road.lanes):
                    self._lane_divider(paths.offset(road.centre, side * index * LANE_WIDTH))
                if road.parking:
                    kerb = paths.offset(road.centre, side * (road.lanes * LANE_WIDTH + PARKING_WIDTH))
                    strip = shapely.Polygon(np.concatenate([edge, kerb[::-1]])[:, :2])
                    fields = {
                        "polygon_token": self.polygon(strip),
                        "orientation": float(paths.headings(road.centre)[0]),
                        "road_block_token": block,
                    }
                    self.add("carpark_area", fields)
        for junction in town.junctions:
            circle = shapely.Point(junction.centre).buffer(junction.radius).intersection(town.drivable)
            for polygon in polygons_of(circle):
                self.add(
                    "road_segment",
                    {
                        "polygon_token": self.polygon(polygon),
                        "is_intersection": junction.signalised,
                        "drivable_area_token": area,
                    },
                )
        return segments

    def _lane_divider(self, points: Float[np.ndarray, "K 2"]) -> None:
        line = self.line(points[::3])
        node_tokens = self.layers["line"][-1]["node_tokens"]
        parts = [{"node_token": token, "segment_type": "SINGLE_DASHED_WHITE"} for token in node_tokens]
        self.add("lane_divider", {"line_token": line, "lane_divider_segments": parts})

    def _lane_token(self, lane: Lane) -> str:
        return self.token("lane" if lane.road is not None else "lane_connector", lane.key)

    def _lane(self, lane: Lane, crossings: dict[tuple[int, int], str]) -> None:
        left, right = (paths.offset(lane.centre, side * LANE_WIDTH / 2) for side in (1.0, -1.0))
        outline = shapely.make_valid(shapely.Polygon(np.concatenate([left[::2], right[::-2]])))
        polygon = self.polygon(max(polygons_of(outline), key=lambda part: part.area))
        if lane.road is None:
            self.add("lane_connector", {"polygon_token": polygon}, lane.key)
            return
        fields = {
            "polygon_token": polygon,
            "lane_type": "CAR",
            "from_edge_line_token": self.line([left[0], right[0]]),
            "to_edge_line_token": self.line([left[-1], right[-1]]),
            "left_lane_divider_segments": [],
            "right_lane_divider_segments": [],
        }
        self.add("lane", fields, lane.key)
        if not self.town.junctions[lane.junction].signalised:
            return
        stop = max(len(lane.centre) - 1 - round(STOP_SETBACK), 1)
        bar = np.stack([left[stop], right[stop], right[stop - 1], left[stop - 1]])
        crossing = crossings.get((lane.junction, lane.arm))
        self.add(
            "stop_line",
            {
                "polygon_token": self.polygon(shapely.Polygon(bar)),
                "stop_line_type": "PED_CROSSING",
                "ped_crossing_tokens": [crossing] if crossing else [],
                "traffic_light_tokens": [],
                "road_block_token": "",
            },
        )


def arcline_path(centre: Float[np.ndarray, "K 2"], piece: float = 4.0) -> list[dict[str, Any]]:
    """A lane's centre line as the devkit's arc paths: one arc or straight of about `piece` metres each."""
    line = paths.resample(centre, piece)
    result = []
    for start, end, heading in zip(line[:-1], line[1:], _tangents(line), strict=True):
        chord = end - start
        length = float(exact.norm(chord))
        # The tangent-chord angle of a circular arc is half of what the arc turns.
        half_turn = float((exact.arctan2(chord[1], chord[0]) - heading + np.pi) % (2 * np.pi) - np.pi)
        straight = abs(half_turn) < 1e-4
        radius = 999.0 if straight else length / (2 * abs(exact.cos_sin(half_turn)[1]))
        arc = length if straight else 2 * abs(half_turn) * radius
        end_heading = heading + 2 * half_turn
        result.append(
            {
                "start_pose": [float(start[0]), float(start[1]), float(heading)],
                "end_pose": [float(end[0]), float(end[1]), float(end_heading)],
                "shape": "LSL" if straight or half_turn > 0 else "RSR",
                "radius": float(radius),
                "segment_length": [0.0, arc, 0.0] if straight else [arc, 0.0, 0.0],
            }
        )
    return result


def _tangents(line: Float[np.ndarray, "K 2"]) -> Float[np.ndarray, "K-1"]:
    """Start heading of every piece, chained so that consecutive arcs join smoothly."""
    steps = np.diff(line, axis=0)
    chords = np.unwrap(exact.arctan2(steps[:, 1], steps[:, 0]))
    tangents = np.empty(len(chords))
    for i, chord in enumerate(chords):
        before = chords[max(i - 1, 0)]
        tangents[i] = (before + chord) / 2
    return tangents

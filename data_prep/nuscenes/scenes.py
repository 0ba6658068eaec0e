"""The scenes of a nuScenes folder's tables, one after the other, as plain data.

The splits say which scenes are for training and which for validation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from data_prep.nuscenes.tables import (
    CalibratedSensor,
    Category,
    EgoPose,
    Instance,
    Log,
    Map,
    Sample,
    SampleAnnotation,
    SampleData,
    SceneRow,
    Sensor,
    Tables,
)
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data.frame import check_principal_point
from spacedrive_jax.data.keyframe import Annotation, Keyframe, Scene, SensorFrame
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import inside

_TRAINVAL_VAL = (
    "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 "
    "775 777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073"
)
_TRAINVAL_TRAIN = (
    "1-2 4-11 19-34 41-76 120-135 138-139 149-152 154-155 157-168 170-185 187-188 190-196 199-200 202-204 "
    "206-214 218-220 222 224-264 283-306 315-318 321 323-324 328 347-386 388-403 405-408 410-459 461-465 "
    "467-469 471-472 474-480 499-502 504-515 517-518 525-539 541-546 566 568 570-578 580 582-600 639-679 681 "
    "683-689 695-698 700-701 703-719 726-728 730-731 733-741 744 746-747 749-752 757-765 767-769 786-787 "
    "789-792 803-806 808-813 815-817 819-822 847-856 858 860-866 868-873 875-878 880 882-903 945 947 949 "
    "952-953 955-961 975-984 988-992 994-1025 1044-1058 1074-1102 1104-1110"
)
_MINI_TRAIN = "61 553 655 757 796 1077 1094 1100"
_MINI_VAL = "103 916"

FALLBACK_VAL_SHARE = 0.2


def _scene_names(ranges: str) -> frozenset[str]:
    names: set[str] = set()
    for item in ranges.split():
        first, _, last = item.partition("-")
        names.update(f"scene-{number:04d}" for number in range(int(first), int(last or first) + 1))
    return frozenset(names)


OFFICIAL_SPLITS: Mapping[str, Mapping[str, frozenset[str]]] = {
    "v1.0-trainval": {"train": _scene_names(_TRAINVAL_TRAIN), "val": _scene_names(_TRAINVAL_VAL)},
    "v1.0-mini": {"train": _scene_names(_MINI_TRAIN), "val": _scene_names(_MINI_VAL)},
}
"""Version to split to scene names, as published with nuScenes (700/150 and 8/2 scenes)."""


SYNTHETIC_VERSION = "v1.0-synthetic"
"""Written by `synthesize`, whose scenes share nuScenes' numbering and nothing else."""


def split_scenes(version: str, scene_names: Sequence[str], seed: int = 0) -> tuple[dict[str, str], str]:
    """Assigns every scene to `train` or `val`.

    A scene of the official lists is on them by its name, whatever else is in the tables: mini goes by its own
    lists, every other version by trainval's. Other scenes (a synthetic world, an own recording) are split by
    rank of the SHA-256 of seed and name: the first fifth of them goes to `val`, at least one scene when there
    are two or more; a single scene is for training. The scenes of `v1.0-test`, which have no annotations to
    train on, all go to `val`.

    Args:
        version: the nuScenes version, such as `v1.0-mini`.
        scene_names: all scenes of that version's tables.
        seed: changes the hashed split; the official lists ignore it.

    Returns:
        Scene name to split, and the rule that was used: `official`, `hashed` or `official, others hashed`.
    """
    if version == "v1.0-test":
        return dict.fromkeys(scene_names, "val"), "official"
    listed = {} if version == SYNTHETIC_VERSION else _listed(version)
    official = {name: listed[name] for name in scene_names if name in listed}
    others = [name for name in scene_names if name not in official]
    ranked = sorted(others, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    val_count = max(1, round(FALLBACK_VAL_SHARE * len(ranked))) if len(ranked) > 1 else 0
    val = set(ranked[:val_count])
    splits = {name: official.get(name) or ("val" if name in val else "train") for name in scene_names}
    rule = "hashed" if not official else "official, others hashed" if others else "official"
    return splits, rule


def _listed(version: str) -> dict[str, str]:
    lists = [OFFICIAL_SPLITS["v1.0-trainval"]]
    if version in OFFICIAL_SPLITS:
        lists.append(OFFICIAL_SPLITS[version])
    return {name: split for each in lists for split, names in each.items() for name in names}


LIDAR = "LIDAR_TOP"

MAX_SPEED = 100.0
"""Metres a second; poses that lie farther apart are a mistake in the tables, not a drive."""
POSE_JITTER = 10.0
"""Metres that two poses may lie apart however little time is between them."""
FAST = 2.0
"""Metres between keyframes that nobody drives in reverse, or sideways."""
MAX_SENSOR_DELAY_US = 5_000_000
"""Between a keyframe's time and that of its sensors; nuScenes' stay below 0.1 s."""
MAX_AGENT_DISTANCE = 5000.0
"""Metres from the vehicle to an annotated box."""


def read_scenes(tables: Tables) -> Iterator[Scene]:
    """Yields the scenes in table order, each built when asked for.

    Raises:
        DataError: a keyframe chain is broken, a keyframe lacks one of its seven sensors, an annotation
            chain leaves its scene or its agent, a file name leaves the dataroot, the vehicle jumps or goes
            against its heading, or a camera looks elsewhere than its name says.
    """
    sensor_rows = _keyframe_sensor_rows(tables)
    annotation_rows: defaultdict[str, list[SampleAnnotation]] = defaultdict(list)
    for row in tables[SampleAnnotation].values():
        annotation_rows[row.sample_token].append(row)
    map_masks = {log: mask for mask in tables[Map].values() for log in mask.log_tokens}
    seen: set[str] = set()
    for scene_row in tables[SceneRow].values():
        if scene_row.name in seen:
            raise DataError(
                f"scene.json: row {scene_row.token!r}, field 'name': {scene_row.name} occurs twice"
            )
        seen.add(scene_row.name)
        samples = _sample_chain(tables, scene_row)
        rows = [row for sample in samples for row in annotation_rows[sample.token]]
        first = 0
        keyframes: list[Keyframe] = []
        for sample in samples:
            count = len(annotation_rows[sample.token])
            keyframes.append(_keyframe(tables, sample, sensor_rows, range(first, first + count)))
            first += count
        _check_drive(scene_row.name, keyframes)
        log = tables[Log][scene_row.log_token]
        mask = map_masks.get(log.token)
        yield Scene(
            name=scene_row.name,
            description=scene_row.description,
            location=log.location,
            log=log.logfile,
            map_mask=_file_name("map", mask) if mask else "",
            keyframes=tuple(keyframes),
            annotations=_annotations(tables, scene_row.name, keyframes, rows),
        )


@dataclasses.dataclass(frozen=True)
class PackedScene:
    """A scene that waits for its worker: what planning asks of it, and the whole of it as bytes.

    All scenes of v1.0-trainval take 0.3 GB so, and six times that as objects. A worker is handed one.
    """

    name: str
    location: str
    map_mask: str
    num_keyframes: int
    sweep: str
    """File of the first keyframe's LIDAR_TOP, relative to the dataroot."""
    packed: bytes

    @classmethod
    def pack(cls, scene: Scene) -> PackedScene:
        """Packs a scene."""
        return cls(
            scene.name,
            scene.location,
            scene.map_mask,
            len(scene.keyframes),
            scene.keyframes[0].lidar.filename,
            msgspec.msgpack.encode(scene),
        )

    def unpack(self) -> Scene:
        """The scene again."""
        return msgspec.msgpack.decode(self.packed, type=Scene)


def _keyframe_sensor_rows(tables: Tables) -> dict[tuple[str, str], SampleData]:
    """(sample token, channel) to the keyframe's `sample_data` row."""
    rows: dict[tuple[str, str], SampleData] = {}
    for row in tables[SampleData].values():
        calibration = tables[CalibratedSensor][row.calibrated_sensor_token]
        channel = tables[Sensor][calibration.sensor_token].channel
        key = row.sample_token, channel
        if key in rows:
            raise DataError(
                f"sample_data.json: rows {rows[key].token!r} and {row.token!r} are both the {channel} "
                f"data of keyframe {row.sample_token!r}"
            )
        rows[key] = row
    return rows


def _sample_chain(tables: Tables, scene: SceneRow) -> list[Sample]:
    """The scene's samples from first to last along `next`."""
    samples = tables[Sample]
    chain = [samples[scene.first_sample_token]]
    # A circle ends at the number of samples there are, whatever the scene declares.
    longest = min(scene.nbr_samples, len(samples))
    while chain[-1].next and len(chain) <= longest:
        chain.append(samples[chain[-1].next])
    if len(chain) != scene.nbr_samples or chain[-1].token != scene.last_sample_token:
        raise DataError(
            f"scene.json: {scene.name} declares {scene.nbr_samples} keyframes ending at "
            f"{scene.last_sample_token!r}, but the `next` chain in sample.json does not lead there "
            f"(stopped after {len(chain)} at {chain[-1].token!r})"
        )
    for earlier, later in itertools.pairwise(chain):
        if later.scene_token != scene.token or later.timestamp <= earlier.timestamp:
            raise DataError(
                f"sample.json: row {later.token!r} follows {earlier.token!r} in {scene.name} but "
                f"belongs to another scene or is not later in time"
            )
        if later.prev != earlier.token:
            raise DataError(
                f"sample.json: row {later.token!r}, field 'prev' names {later.prev!r}, but it is the `next` "
                f"of {earlier.token!r}"
            )
    if chain[0].prev or chain[0].scene_token != scene.token:
        raise DataError(
            f"sample.json: row {chain[0].token!r} is the first of {scene.name}, but belongs to another scene "
            f"or its field 'prev' names {chain[0].prev!r}"
        )
    return chain


def _keyframe(
    tables: Tables, sample: Sample, sensor_rows: Mapping[tuple[str, str], SampleData], annotations: range
) -> Keyframe:
    frames = {}
    for channel in (*CAMERAS, LIDAR):
        row = sensor_rows.get((sample.token, channel))
        if row is None:
            raise DataError(
                f"sample_data.json: keyframe {sample.token!r} has no {channel} row: the table is not whole, "
                "unpack the release's metadata again. In a recording of your own give it one, which says "
                "where that sensor was, whether or not its file is there (--missing-images is about files)"
            )
        if abs(row.timestamp - sample.timestamp) > MAX_SENSOR_DELAY_US:
            raise DataError(
                f"sample_data.json: row {row.token!r}, field 'timestamp': {row.timestamp} is "
                f"{abs(row.timestamp - sample.timestamp) / 1e6:.1f} s off its keyframe {sample.token!r}"
            )
        frames[channel] = _sensor_frame(tables, channel, row)
    lidar = frames[LIDAR]
    for channel in CAMERAS:
        pose = tables[EgoPose][sensor_rows[sample.token, channel].ego_pose_token]
        _check_step(lidar, frames[channel], f"ego_pose.json: row {pose.token!r}", "the LIDAR_TOP pose")
    return Keyframe(
        token=sample.token,
        timestamp_us=sample.timestamp,
        cameras=tuple(frames[channel] for channel in CAMERAS),
        lidar=lidar,
        annotations=tuple(annotations),
    )


def _check_step(here: SensorFrame, there: SensorFrame, what: str, whose: str) -> None:
    """Refuses two poses that no vehicle can have within the time between them."""
    distance = math.dist(here.ego_translation, there.ego_translation)
    seconds = abs(there.timestamp_us - here.timestamp_us) * 1e-6
    if distance > MAX_SPEED * seconds + POSE_JITTER:
        raise DataError(
            f"{what}, field 'translation': {list(there.ego_translation)} is {distance:.0f} m from {whose} "
            f"{seconds:.2f} s apart; no vehicle does that"
        )


def _check_drive(scene: str, keyframes: list[Keyframe]) -> None:
    """Refuses a drive that jumps, whose keyframes are not two a second, or that goes against its heading."""
    seconds, onwards = [], []
    for earlier, later in itertools.pairwise(keyframes):
        what = f"ego_pose.json: LIDAR_TOP of keyframe {later.token!r} in {scene}"
        _check_step(earlier.lidar, later.lidar, what, f"that of the keyframe before ({earlier.token!r})")
        seconds.append((later.timestamp_us - earlier.timestamp_us) * 1e-6)
        here, there = earlier.lidar.ego_translation, later.lidar.ego_translation
        east, north = there[0] - here[0], there[1] - here[1]
        if math.hypot(east, north) > FAST and seconds[-1] < 1:
            w, x, y, z = earlier.lidar.ego_rotation
            ahead = (1 - 2 * (y * y + z * z)) * east + 2 * (x * y + w * z) * north
            onwards.append(ahead > 0.5 * math.hypot(east, north))
    if len(seconds) > 2 and not 0.3 <= statistics.median(seconds) <= 0.8:
        raise DataError(
            f"sample.json: keyframes of {scene} are {statistics.median(seconds):.4g} s apart, not half a "
            "second as records are: keep only such keyframes, and say their time in microseconds"
        )
    if len(onwards) > 2 and 2 * sum(onwards) < len(onwards):
        raise DataError(
            f"ego_pose.json: in {scene} the vehicle moves against or across its heading in "
            f"{onwards.count(False)} of {len(onwards)} steps: are the rotations w x y z, and ego to global?"
        )


def _file_name(table: str, row: SampleData | Map) -> str:
    """A file name of a table, which must stay below the dataroot.

    Links inside the dataroot may lead elsewhere: folders are often assembled from links, by their owner.
    """
    if _PLAIN_PATH.fullmatch(row.filename) is None:  # the others are a quarter of a million
        inside("the dataroot", row.filename, f"{table}.json: row {row.token!r}, field 'filename':")
    return row.filename


_PLAIN_PATH = re.compile(r"[\w+-][\w.+-]*(?:/[\w+-][\w.+-]*)*", re.ASCII)
"""Parts that begin with no dot: none of them leads up."""


def _sensor_frame(tables: Tables, channel: str, row: SampleData) -> SensorFrame:
    pose = tables[EgoPose][row.ego_pose_token]
    calibration = tables[CalibratedSensor][row.calibrated_sensor_token]
    if channel in CAMERAS:
        _check_intrinsics(calibration, channel)
        _check_direction(calibration, channel)
        if not (row.height and row.width):
            raise DataError(
                f"sample_data.json: row {row.token!r} ({channel}), fields 'width' and 'height': "
                f"{row.width}x{row.height} is no image"
            )
        what = f"calibrated_sensor.json: row {calibration.token!r} ({channel}), field 'camera_intrinsic'"
        check_principal_point(calibration.camera_intrinsic, (row.height, row.width), what)
    return SensorFrame(
        filename=_file_name("sample_data", row),
        timestamp_us=row.timestamp,
        ego_translation=pose.translation,
        ego_rotation=pose.rotation,
        sensor_translation=calibration.translation,
        sensor_rotation=calibration.rotation,
        intrinsics=tuple(calibration.camera_intrinsic),
        height=row.height,
        width=row.width,
    )


def _check_intrinsics(calibration: CalibratedSensor, channel: str) -> None:
    what = f"calibrated_sensor.json: row {calibration.token!r} ({channel}), field 'camera_intrinsic'"
    matrix = calibration.camera_intrinsic
    if len(matrix) != 3:
        raise DataError(f"{what} is not a 3 x 3 matrix")
    focal = min(matrix[0][0], matrix[1][1])
    if focal <= 0 or matrix[2] != (0, 0, 1) or matrix[1][0] != 0:
        raise DataError(
            f"{what}: {[list(line) for line in matrix]} is no camera matrix [[fx, s, cx], [0, fy, cy], "
            "[0, 0, 1]] with fx and fy above 0"
        )


def _check_direction(calibration: CalibratedSensor, channel: str) -> None:
    """Refuses a camera that lies on its back, stands on its head, or looks to another's side."""
    w, x, y, z = calibration.rotation
    ahead, left, up = 2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)
    lower_edge = 2 * (y * z + w * x)
    towards = {"CAM_FRONT": ahead, "LEFT": left, "RIGHT": -left}
    side = channel if channel in towards else channel.split("_")[-1]
    if lower_edge >= 0 or abs(up) > 0.7 or towards.get(side, 1.0) < -0.3:
        raise DataError(
            f"calibrated_sensor.json: row {calibration.token!r} ({channel}), field 'rotation': by "
            f"{list(calibration.rotation)} it looks along [{ahead:.2f}, {left:.2f}, {up:.2f}] of the vehicle"
            f"{', upside down' if lower_edge >= 0 else ''}: is it w x y z, and camera to ego?"
        )


def _annotations(
    tables: Tables, scene: str, keyframes: list[Keyframe], rows: list[SampleAnnotation]
) -> tuple[Annotation, ...]:
    index = {row.token: position for position, row in enumerate(rows)}
    keyframe = {one.token: position for position, one in enumerate(keyframes)}
    instances, categories = tables[Instance], tables[Category]

    def neighbour(row: SampleAnnotation, field: str, token: str, step: int) -> int:
        if not token:
            return -1
        place = index.get(token, -1)
        other = rows[place]
        back = other.prev if step > 0 else other.next
        if place < 0:
            why = f"leaves its scene {scene}"
        elif other.instance_token != row.instance_token or back != row.token:
            why = f"names {token!r}, which is of another agent or does not name it back"
        elif (keyframe[other.sample_token] - keyframe[row.sample_token]) * step <= 0:
            why = f"names {token!r}, which is not {'later' if step > 0 else 'earlier'}"
        else:
            return place
        raise DataError(f"sample_annotation.json: row {row.token!r}, field {field!r} {why}")

    egos = {one.token: one.lidar.ego_translation for one in keyframes}
    for row in rows:
        ego = egos[row.sample_token]
        if math.dist(ego, row.translation) > MAX_AGENT_DISTANCE:
            raise DataError(
                f"sample_annotation.json: row {row.token!r}, field 'translation': {list(row.translation)} is "
                f"{math.dist(ego, row.translation):.0f} m from the vehicle"
            )
    return tuple(
        Annotation(
            instance_token=row.instance_token,
            category=categories[instances[row.instance_token].category_token].name,
            translation=row.translation,
            size=row.size,
            rotation=row.rotation,
            lidar_points=row.num_lidar_pts,
            previous=neighbour(row, "prev", row.prev, -1),
            next=neighbour(row, "next", row.next, 1),
            keyframe=keyframe[row.sample_token],
        )
        for row in rows
    )

"""Where the clips of a Bench2Drive folder are, and what a clip's files hold.

A clip is `<Scenario>_<Town>_Route<n>_Weather<n>`: a folder with `anno/00000.json.gz`,
`camera/rgb_front/00000.jpg` and so on (some lie deeper, so `anno` is looked for), or a tar file of one.

LiDAR sweeps are LAZ files. Their points are in the ego frame already, the sensor's place added, with y to
the right as all of CARLA.

The official split says which clips are for training and which for validation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from data_prep.nuscenes.scenes import split_scenes
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.io import MEBIBYTE, read_bytes, say

PICTURES: Mapping[str, str] = {f"rgb_{camera.removeprefix('CAM_').lower()}": camera for camera in CAMERAS}
"""Folder of a camera's pictures to the camera."""
TAR_ENDINGS = (".tar.gz", ".tgz", ".tar")
MOST_ANNO = 256 * MEBIBYTE
"""Bytes of one frame's annotations, unpacked; a crowded frame has 3."""
MOST_PICTURE = 64 * MEBIBYTE
_ANNO = re.compile(r"(?:^|/)anno/(\d{1,6})\.json\.gz$")
_PICTURE = re.compile(r"(?:^|/)camera/(rgb_[a-z_]+)/(\d{1,6})\.jpg$")
_SWEEP = re.compile(r"(?:^|/)lidar/(\d{1,6})\.laz$")
_TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error)
_NAME = re.compile(r"(?P<scenario>\w+?)_(?P<town>Town\w+?)_Route(?P<route>\d+)_Weather(?P<weather>\d+)")


@dataclasses.dataclass(frozen=True)
class Clip:
    """One recorded drive."""

    name: str
    path: Path
    """Its folder (that holds `anno`) or tar file."""

    @property
    def parts(self) -> Mapping[str, str]:
        """`scenario`, `town`, `route`, `weather`; empty where the name does not tell."""
        match = _NAME.fullmatch(self.name)
        return match.groupdict() if match else {}


@dataclasses.dataclass(frozen=True)
class ClipFiles:
    """The files of a clip that a conversion reads."""

    annotations: Mapping[int, bytes]
    """JSON of every frame, by frame number."""
    pictures: Mapping[tuple[int, str], bytes]
    """JPEGs of the wanted frames, by frame number and camera."""
    sweeps: Mapping[int, bytes]
    """LAZ files of the wanted frames, where they are asked for."""


def find_clips(root: Path) -> list[Clip]:
    """All clips below a folder, by name.

    Raises:
        DataError: there is none, or two have the same name.
    """
    if not root.is_dir():
        raise DataError(f"--dataroot {root} is not a folder")
    root = Path(os.path.abspath(root))  # a clip that is given itself, as `.`, has a name too
    clips = [Clip(path.parent.name, path.parent) for path in root.rglob("anno") if path.is_dir()]
    for path in root.rglob("*"):
        ending = next((one for one in TAR_ENDINGS if path.name.endswith(one)), None)
        if ending is not None and path.is_file():
            clips.append(Clip(path.name.removesuffix(ending), path))
    clips.sort(key=lambda clip: (clip.name, str(clip.path)))
    if not clips:
        raise DataError(f"{root} holds no clip: neither a folder with anno/ in it nor a tar file")
    for one, other in itertools.pairwise(clips):
        if one.name == other.name:
            raise DataError(f"clip {one.name} is there twice: {one.path} and {other.path}; remove one")
    return clips


def clip_digest(clip: Clip) -> str:
    """Tells a clip's content by the names and sizes of its files."""
    lines = []
    paths = [clip.path] if clip.path.is_file() else sorted(clip.path.rglob("*"))
    for path in paths:
        name = path.relative_to(clip.path.parent).as_posix()
        wanted = path == clip.path or any(kind.search(name) for kind in (_ANNO, _PICTURE, _SWEEP))
        if path.is_file() and wanted:
            lines.append(f"{name} {path.stat().st_size}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_clip(clip: Clip, offset: int, step: int, *, lidar: bool = False) -> ClipFiles:
    """Reads all annotations of a clip, and pictures (and sweeps) of every `step`th frame from `offset` on.

    A tar file is read once from front to back; nothing is unpacked to the disk.

    Raises:
        DataError: a file cannot be read, or is larger than such a file may be; or a tar file holds several
            clips, whose frames would replace each other's.
    """
    folder: str | None = None
    annotations: dict[int, bytes] = {}
    pictures: dict[tuple[int, str], bytes] = {}
    sweeps: dict[int, bytes] = {}
    files = _tar_files(clip.path) if clip.path.is_file() else _folder_files(clip.path)
    for name, read in files:
        anno, picture = _ANNO.search(name), _PICTURE.search(name)
        if anno:
            above = name[: anno.start()]
            folder = above if folder is None else folder
            if above != folder:
                raise DataError(
                    f"{clip.path} holds several clips ({folder}, {above}): unpack it, or cut it up"
                )
            annotations[int(anno[1])] = _unzipped(read.bytes(MOST_ANNO), f"{clip.path}: {name}")
        elif picture and picture[1] in PICTURES and int(picture[2]) % step == offset:
            pictures[int(picture[2]), PICTURES[picture[1]]] = read.bytes(MOST_PICTURE)
        elif lidar and (sweep := _SWEEP.search(name)) and int(sweep[1]) % step == offset:
            sweeps[int(sweep[1])] = read.bytes(MOST_PICTURE)
    if not annotations:
        raise DataError(f"{clip.path} holds no anno/*.json.gz")
    return ClipFiles(dict(sorted(annotations.items())), pictures, sweeps)


@dataclasses.dataclass(frozen=True)
class _File:
    """A file that may be read."""

    path: Path
    archive: tarfile.TarFile | None = None
    member: tarfile.TarInfo | None = None

    def bytes(self, most: int) -> bytes:
        if self.archive is None or self.member is None:
            return read_bytes(self.path, most=most)
        if self.member.size > most:
            raise DataError(f"{self.path}: {self.member.name} has {self.member.size:,} bytes, too many")
        try:
            stream = self.archive.extractfile(self.member)
            return b"" if stream is None else stream.read()
        except _TAR_ERRORS as error:
            raise DataError(f"{self.path} is no whole tar file ({error}): fetch it again") from error


def _folder_files(folder: Path) -> Iterator[tuple[str, _File]]:
    for part in ("anno", *(f"camera/{name}" for name in PICTURES), "lidar"):
        for path in sorted((folder / part).glob("*")):
            yield f"{part}/{path.name}", _File(path)


def _tar_files(path: Path) -> Iterator[tuple[str, _File]]:
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isreg():
                    yield member.name, _File(path, archive, member)
    except _TAR_ERRORS as error:
        raise DataError(f"{path} is no whole tar file ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: {say(error)}") from error


def _unzipped(data: bytes, what: str) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        text = unpacker.decompress(data, MOST_ANNO)
    except zlib.error as error:
        raise DataError(f"{what} is no gzip file ({error}): is it damaged?") from error
    if not unpacker.eof:
        too_large = bool(unpacker.unconsumed_tail)
        raise DataError(f"{what} is {'larger than it may be' if too_large else 'cut short'}")
    return text


MOST_POINTS = 5_000_000
"""A sweep has some 60,000."""


def laz_reader() -> ModuleType:
    """The package that reads LAZ.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import laspy
    except ImportError:
        raise ConfigError(
            "--lidar reads LAZ files: pip install -r requirements-bench2drive.txt, or leave it out"
        ) from None
    return laspy


def sweep_bytes(laz: bytes, what: str) -> bytes:
    """A sweep as nuScenes' files have it: float32 x y z intensity ring, here in the ego frame, ring 0.

    Args:
        laz: the file's bytes.
        what: what to call it in an error.

    Raises:
        DataError: it is damaged, or holds more points than a sweep may.
    """
    laspy = laz_reader()
    try:
        with laspy.open(io.BytesIO(laz)) as file:
            count = int(file.header.point_count)
            if count > MOST_POINTS:
                raise DataError(f"{what} has {count:,} points, more than the {MOST_POINTS:,} it may have")
            points = file.read()
        intensity = points.intensity if "intensity" in points.point_format.dimension_names else 0
        rows = np.zeros((count, 5), np.float32)
        rows[:, 0], rows[:, 1], rows[:, 2] = points.x, -np.asarray(points.y), points.z
        rows[:, 3] = intensity
    except DataError:
        raise
    except Exception as error:  # of many kinds on damaged files, the decompressor's own among them
        raise DataError(f"{what} is no whole LAZ file ({error}): fetch it again") from error
    return rows.tobytes()


TOWNS = frozenset(
    [
        "Town01",
        "Town02",
        "Town03",
        "Town04",
        "Town05",
        "Town06",
        "Town07",
        "Town10HD",
        "Town11",
        "Town12",
        "Town13",
        "Town15",
    ]
)
"""CARLA's, that the benchmark's data was recorded in."""

VALIDATION = frozenset(
    [
        "AccidentTwoWays_Town12_Route1115_Weather23",
        "Accident_Town05_Route218_Weather10",
        "BlockedIntersection_Town03_Route135_Weather5",
        "ConstructionObstacleTwoWays_Town12_Route1093_Weather1",
        "ConstructionObstacle_Town10HD_Route74_Weather22",
        "ConstructionObstacle_Town12_Route78_Weather0",
        "ControlLoss_Town04_Route170_Weather14",
        "ControlLoss_Town10HD_Route378_Weather14",
        "CrossingBicycleFlow_Town12_Route977_Weather15",
        "DynamicObjectCrossing_Town01_Route3_Weather3",
        "DynamicObjectCrossing_Town02_Route11_Weather11",
        "EnterActorFlow_Town03_Route132_Weather2",
        "HardBreakRoute_Town01_Route32_Weather6",
        "HazardAtSideLaneTwoWays_Town12_Route1151_Weather7",
        "HazardAtSideLane_Town10HD_Route373_Weather9",
        "HighwayCutIn_Town12_Route1029_Weather15",
        "HighwayExit_Town06_Route312_Weather0",
        "InterurbanActorFlow_Town12_Route1291_Weather1",
        "InterurbanAdvancedActorFlow_Town06_Route324_Weather2",
        "InvadingTurn_Town02_Route95_Weather9",
        "LaneChange_Town06_Route307_Weather21",
        "MergerIntoSlowTrafficV2_Town12_Route857_Weather25",
        "MergerIntoSlowTraffic_Town06_Route317_Weather5",
        "NonSignalizedJunctionLeftTurnEnterFlow_Town12_Route949_Weather13",
        "NonSignalizedJunctionLeftTurn_Town07_Route342_Weather3",
        "NonSignalizedJunctionRightTurn_Town03_Route126_Weather18",
        "OppositeVehicleRunningRedLight_Town04_Route180_Weather23",
        "OppositeVehicleTakingPriority_Town04_Route214_Weather6",
        "ParkedObstacleTwoWays_Town13_Route1333_Weather26",
        "ParkedObstacle_Town06_Route282_Weather22",
        "ParkedObstacle_Town10HD_Route372_Weather8",
        "ParkingCrossingPedestrian_Town13_Route545_Weather25",
        "ParkingCutIn_Town13_Route1343_Weather1",
        "ParkingExit_Town12_Route922_Weather12",
        "PedestrianCrossing_Town13_Route747_Weather19",
        "SignalizedJunctionLeftTurnEnterFlow_Town13_Route657_Weather2",
        "SignalizedJunctionLeftTurn_Town04_Route173_Weather26",
        "SignalizedJunctionRightTurn_Town03_Route118_Weather14",
        "StaticCutIn_Town05_Route226_Weather18",
        "TJunction_Town05_Route260_Weather0",
        "TJunction_Town06_Route306_Weather20",
        "VanillaNonSignalizedTurnEncounterStopsign_Town12_Route979_Weather9",
        "VanillaSignalizedTurnEncounterGreenLight_Town07_Route354_Weather8",
        "VanillaSignalizedTurnEncounterRedLight_Town07_Route359_Weather21",
        "VanillaSignalizedTurnEncounterRedLight_Town15_Route491_Weather23",
        "VehicleOpensDoorTwoWays_Town12_Route1203_Weather7",
        "VehicleTurningRoutePedestrian_Town15_Route445_Weather11",
        "VehicleTurningRoutePedestrian_Town15_Route481_Weather19",
        "VehicleTurningRoute_Town15_Route504_Weather10",
        "YieldToEmergencyVehicle_Town04_Route166_Weather10",
    ]
)
"""The 50 clips of the base set that Bench2DriveZoo validates on (data/splits); all others are trained on."""


def split_clips(clips: Sequence[Clip], seed: int) -> tuple[dict[str, str], str]:
    """Assigns every clip to `train` or `val`.

    Args:
        clips: of one data set.
        seed: of the split where the clips are not the benchmark's.

    Returns:
        Clip name to split, and the rule: `official` where all clips are of CARLA's towns, else `hashed`.
    """
    if all(clip.parts.get("town") in TOWNS for clip in clips):
        return {clip.name: "val" if clip.name in VALIDATION else "train" for clip in clips}, "official"
    return split_scenes("bench2drive", [clip.name for clip in clips], seed)

"""Where the clips of a Bench2Drive folder are, and what a clip's files hold.

A clip is `<Scenario>_<Town>_Route<n>_Weather<n>`: a folder with `anno/00000.json.gz`,
`camera/rgb_front/00000.jpg` and so on (some lie deeper, so `anno` is looked for), or a tar file of one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.errors import DataError
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
        DataError: a file cannot be read, or is larger than such a file may be.
    """
    annotations: dict[int, bytes] = {}
    pictures: dict[tuple[int, str], bytes] = {}
    sweeps: dict[int, bytes] = {}
    files = _tar_files(clip.path) if clip.path.is_file() else _folder_files(clip.path)
    for name, read in files:
        anno, picture = _ANNO.search(name), _PICTURE.search(name)
        if anno:
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

"""The depth sidecar: a network's patch depth for every keyframe of a records folder.

    RECORDS/depth/NAME/chunk-00000.safetensors   some keyframes each; random access by row
    RECORDS/depth/NAME/provenance.json           written last: the sidecar is whole

NAME is the kind of network and a fingerprint of its weights and settings. Every chunk carries that
fingerprint and the records', every row its keyframe's token and a checksum (safetensors has none), and the
provenance a digest of itself, so that depth of another model, of other records or of another keyframe cannot
slip in, nor what a disk got wrong.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import cv2
import msgspec
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from spacedrive_jax.data.lidar import Alignment
from spacedrive_jax.data.schema import DEPTH_SCALE
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.io import MEBIBYTE, inside, local, place, require_regular, write_bytes
from spacedrive_jax.json_files import convert, json_digest, parse_json, read_json, write_json

FOLDER = "depth"
PROVENANCE = "provenance.json"

NetworkKind = Literal["unidepth", "depth_anything"]


@dataclasses.dataclass(frozen=True)
class CachedDepth:
    """A network's depth of one keyframe."""

    kind: NetworkKind
    pooling: str
    patch_depth: Float[np.ndarray, "N h w"]
    """Metres, as the network has it."""
    alignments: tuple[Alignment, ...]
    """Per camera: the scale and shift that fit it to LiDAR."""
    full: tuple[bytes, ...]
    """Per camera: depth of every pixel as a 16-bit PNG (see `DEPTH_SCALE`); empty where it was not kept."""


class _Provenance(msgspec.Struct):
    kind: NetworkKind
    fingerprint: str
    records_fingerprint: str
    pooling: str
    grid: tuple[int, int]
    full: bool
    chunks: list[str]
    digest: str


class DepthCache:
    """Reads one sidecar; thread-safe, as each read opens its file anew through a memory map."""

    def __init__(self, folder: Path, records_fingerprint: str) -> None:
        """Opens a finished sidecar.

        Args:
            folder: `RECORDS/depth/NAME`.
            records_fingerprint: of the records it must belong to.

        Raises:
            DataError: it is unfinished, damaged, or was made from other records.
        """
        self.folder = folder
        self.provenance = read_provenance(folder)
        if self.provenance["records_fingerprint"] != records_fingerprint:
            raise DataError(
                f"{folder} was made from other records (fingerprint "
                f"{self.provenance['records_fingerprint'][:12]}, these have {records_fingerprint[:12]}): the "
                "records were converted again since; remove it and run `python -m data_prep add-depth`"
            )
        self._rows: dict[str, tuple[Path, int]] = {}
        for name in self.provenance["chunks"]:
            file = inside(folder, name, f"{folder / PROVENANCE}: chunks:")
            metadata = chunk_metadata(file)
            if metadata.get("fingerprint") != self.provenance["fingerprint"]:
                raise DataError(f"{file} is of another depth model than its folder says; remove {folder}")
            if not isinstance(tokens := parse_json(metadata.get("tokens", "null"), file), list):
                raise DataError(
                    f"{file} does not name its keyframes; remove {folder} and run add-depth again"
                )
            self._rows |= {str(token): (file, row) for row, token in enumerate(tokens)}

    def __contains__(self, token: str) -> bool:
        """Whether it holds a keyframe."""
        return token in self._rows

    def read(self, token: str) -> CachedDepth:
        """The depth of one keyframe.

        Raises:
            DataError: the sidecar does not hold it.
        """
        if token not in self._rows:
            raise DataError(f"{self.folder} holds no depth of keyframe {token}; remove it and run add-depth")
        file, row = self._rows[token]
        try:
            return self._row(file, row, token)
        except SpaceDriveError:
            raise
        except (SafetensorError, IndexError, ValueError, TypeError, OverflowError) as error:
            raise DataError(
                f"{file} is damaged ({error}); remove {self.folder} and run add-depth again"
            ) from error

    def _row(self, file: Path, row: int, token: str) -> CachedDepth:
        with _open(file) as tensors:
            patch_depth = tensors.get_slice("patch_depth")[row]
            alignments = tensors.get_slice("alignment")[row]
            checksum = int(tensors.get_slice("checksum")[row])
            full: tuple[bytes, ...] = ()
            if "full" in tensors.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
                offsets = tensors.get_slice("full_offsets")[row]
                data = tensors.get_slice("full")[int(offsets[0]) : int(offsets[-1])].tobytes()
                starts = (offsets - offsets[0]).tolist()
                full = tuple(data[start:stop] for start, stop in itertools.pairwise(starts))
        if checksum != _checksum(token, patch_depth, alignments, full):
            raise ValueError(f"the checksum of row {row} differs")
        if patch_depth.ndim != 3 or not np.isfinite(patch_depth).all() or (patch_depth < 0).any():
            raise ValueError(f"row {row} holds no depth")
        return CachedDepth(
            kind=self.provenance["kind"],
            pooling=self.provenance["pooling"],
            patch_depth=patch_depth,
            alignments=tuple(Alignment(float(s), float(t), int(n)) for s, t, n in alignments),
            full=full,
        )


def find_cache(records: Path, kinds: set[str], name: str | None, *, advice: str = "") -> Path:
    """The sidecar of a records folder that a run asks for; of one in a bucket a copy on this machine.

    Args:
        records: the records folder.
        kinds: acceptable kinds of network.
        name: its name, or its path; None takes the only one there is.
        advice: further flags of the `add-depth` that would make it, for the error.

    Raises:
        SpaceDriveError: there is none, or several and none was named.
    """
    flags = f" {advice}" if advice else ""
    command = f"`python -m data_prep add-depth --records {records} --model WEIGHTS{flags}`"
    if name is not None:
        folder = place(name) if place(name).is_dir() else records / FOLDER / name
        if not folder.is_dir():
            raise ConfigError(f"data.depth.cache {name!r} is neither a folder nor one in {records / FOLDER}")
        return local(folder)
    found = [
        file.parent
        for file in sorted((records / FOLDER).glob(f"*/{PROVENANCE}"))
        if read_provenance(file.parent)["kind"] in kinds
    ]
    if not found:
        raise DataError(f"{records} has no finished depth of {' or '.join(sorted(kinds))}: run {command}")
    if len(found) > 1:
        raise ConfigError(
            f"{records} has several depth caches: set data.depth.cache to one of "
            f"{', '.join(folder.name for folder in found)}"
        )
    return local(found[0])


def read_provenance(folder: Path) -> dict[str, Any]:
    """Reads a sidecar's provenance.json.

    Raises:
        DataError: the sidecar is not finished.
    """
    file = folder / PROVENANCE
    if not file.exists():
        raise DataError(f"{folder} is not finished; run the same `python -m data_prep add-depth` again")
    content = read_json(file, most=MEBIBYTE * 64)
    advice = f"remove {folder} and run add-depth again"
    convert(content, _Provenance, file, advice)
    if content["digest"] != json_digest(content):
        raise DataError(f"{file} is not as add-depth wrote it; {advice}")
    return content


def write_provenance(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a sidecar's provenance.json, with which it is whole.

    Args:
        folder: the sidecar.
        metadata: JSON values: those of the network, `records_fingerprint`, `full`, the names of the `chunks`.
    """
    write_json(folder / PROVENANCE, {**metadata, "digest": json_digest(metadata)})


def _checksum(
    token: str,
    patch_depth: Float[np.ndarray, "N h w"],
    alignments: Float[np.ndarray, "N 3"],
    full: tuple[bytes, ...],
) -> int:
    """CRC-32 of a row: its keyframe, types, shapes and numbers."""
    shapes = f"{token} {patch_depth.dtype}{patch_depth.shape} {alignments.dtype}{alignments.shape}"
    value = zlib.crc32(f"{shapes} {[len(each) for each in full]}".encode())
    for part in (patch_depth.tobytes(), alignments.tobytes(), *full):
        value = zlib.crc32(part, value)
    return value


def write_chunk(file: Path, rows: Mapping[str, list[Any]], made_of: Mapping[str, Any]) -> None:
    """Writes one chunk; it appears under its name only when whole.

    Args:
        file: to write.
        rows: by keyframe: `token`, `patch_depth` (N, h, w), `alignment` (N, 3: scale, shift, points), and
            `full`, a PNG for each camera, where they are kept.
        made_of: `fingerprint` and `records_fingerprint`.
    """
    tensors = {name: np.stack(rows[name]) for name in ("patch_depth", "alignment")}
    pictures = [tuple(views) for views in rows.get("full", [()] * len(rows["token"]))]
    if "full" in rows:
        lengths = np.array([[len(png) for png in views] for views in pictures], np.int64)
        ends = np.cumsum(lengths.ravel()).reshape(lengths.shape)
        tensors["full_offsets"] = np.concatenate([ends[:, :1] - lengths[:, :1], ends], axis=1)
        tensors["full"] = np.frombuffer(b"".join(png for views in pictures for png in views), np.uint8)
    whole = zip(rows["token"], tensors["patch_depth"], tensors["alignment"], pictures, strict=True)
    tensors["checksum"] = np.array([_checksum(*row) for row in whole], np.uint32)
    metadata = {
        "fingerprint": str(made_of["fingerprint"]),
        "records_fingerprint": str(made_of["records_fingerprint"]),
        "tokens": json.dumps(rows["token"]),
        "aligned": str(int(np.sum(tensors["alignment"][..., 2] > 0))),
    }
    # Not safetensors' own `save_file`, whose files only their owner can read.
    write_bytes(file, save(tensors, metadata=metadata))


def chunk_metadata(file: Path) -> Mapping[str, str]:
    """What a chunk says of itself: `fingerprint`, `records_fingerprint`, `tokens` (JSON).

    Raises:
        DataError: it is missing or damaged.
    """
    with _open(file) as tensors:
        return tensors.metadata() or {}


def encode_depth(depth: Float[np.ndarray, "H W"]) -> bytes:
    """Metres to a 16-bit PNG; depth beyond its range (256 m) is cut there."""
    steps = np.clip(np.round(depth * DEPTH_SCALE), 0, np.iinfo(np.uint16).max).astype(np.uint16)
    done, data = cv2.imencode(".png", steps)
    if not done:
        raise ValueError(f"cannot encode depth of shape {depth.shape}")
    return data.tobytes()


def _open(file: Path) -> Any:
    require_regular(file)
    try:
        return safe_open(file, framework="np")
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {file}: {error}; remove it and run add-depth again") from error

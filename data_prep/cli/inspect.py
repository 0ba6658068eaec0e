"""`python -m data_prep inspect`: look at one record, as text and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from spacedrive_jax.console import Command, progress
from spacedrive_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from spacedrive_jax.data.schema import Record


@dataclasses.dataclass(frozen=True)
class Inspect(Command):
    """Print a record of a records folder and, on request, draw it.

    Example: python -m data_prep inspect records --token ca9a282c9e77460f8360f564131a8af5 --image view.png
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECORDS")]
    """Records folder written by `python -m data_prep convert`."""
    token: str | None = None
    """Keyframe to show; default: the middle one of the scene."""
    scene: str | None = None
    """Name of a scene (scene-0103); default: the first."""
    list: tyro.conf.FlagCreatePairsOff[bool] = False
    """List split, scene and token of every keyframe (of --scene, if given) instead of showing one."""
    image: Path | None = None
    """Picture to write (.png, .pdf, .svg or .jpg): the six cameras with boxes and waypoints, and a bird's-eye
    view."""
    film: Path | None = None
    """MP4 to write of a whole --scene: that picture for every keyframe, two a second. Needs the extra `video`
    (imageio-ffmpeg)."""
    rerun: Path | None = None
    """Rerun recording (.rrd) to write of a --scene: cameras, depth points, boxes and the recorded way in 3D.
    Needs the extra `rerun` (rerun-sdk); `rerun FILE.rrd` shows it."""
    keyframes: str | None = None
    """FIRST:END, for --rerun: keyframes of the scene, counted from 0; END itself is left out."""
    points: Path | None = None
    """PLY to write: the views lifted by their depth to one coloured point cloud, the LiDAR sweep in red."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read every shard whole, compare it with its digest, and name those that are damaged."""
    check_images: tyro.conf.FlagCreatePairsOff[bool] = False
    """Decode every picture too, and name those that were damaged before they were converted."""
    depth_cache: str | None = None
    """For --points: sidecar of `add-depth --full` to use; without it the exact depth of drawn views."""

    WRITES: ClassVar[tuple[str, ...]] = ("image", "film", "rerun", "points")
    BUCKETS: ClassVar[tuple[str, ...]] = ("directory",)

    def run(self) -> Mapping[str, Any]:
        """Prints the record; returns its token and the folder's counts."""
        if self.depth_cache is not None and self.points is None:
            raise ConfigError("--depth-cache says whose depth --points lifts: give both")
        if self.points is not None and self.points.suffix.lower() != ".ply":
            raise ConfigError(f"--points {self.points}: point clouds are written as .ply")
        from data_prep.inspect_record import check_pictures, describe_record, find_record
        from spacedrive_jax.data.records_folder import check_contents, read_provenance

        if self.check:
            with progress(desc="check shards", unit="shard") as bar:
                shards = check_contents(self.directory, lambda _: bar.update())
            print(f"{self.directory}: {shards} shards are whole")
        if self.check_images:
            print(f"{self.directory}: {check_pictures(self.directory)} pictures are whole")
        provenance = read_provenance(self.directory)
        if self.token is not None and self.scene is not None:
            raise ConfigError("--token names a keyframe and --scene a scene: give one of them")
        if self.image is not None:
            # matplotlib takes a second to import; the text needs none of it.
            from spacedrive_jax.reporting.style import check_picture

            check_picture(self.image)
        print(
            f"{self.directory}: {provenance['records']} records "
            f"({', '.join(f'{split} {count}' for split, count in provenance['splits'].items())}), "
            f"fingerprint {provenance['fingerprint'][:12]}"
        )
        if self.keyframes is not None and self.rerun is None:
            raise ConfigError("--keyframes says what --rerun shows: give both")
        if self.film is not None:
            return self._film(self.film, provenance["records"])
        if self.rerun is not None:
            return self._rerun(self.rerun, provenance["records"])
        if self.list:
            return self._list(provenance["records"])
        record = find_record(self.directory, self.token, self.scene)
        print(describe_record(record))
        outcome: dict[str, Any] = {"token": record["token"], "records": provenance["records"]}
        if self.image is not None:
            from data_prep.inspect_record import draw_record

            draw_record(record, self.image)
            print(f"drew {self.image}")
            outcome["image"] = str(self.image)
        if self.points is not None:
            outcome["points"] = self._write_points(self.points, record, provenance["fingerprint"])
        return outcome

    def _film(self, film: Path, count: int) -> Mapping[str, Any]:
        from data_prep.inspect_record import film_scene

        if self.scene is None:
            raise ConfigError("--film shows a whole scene: name it with --scene (--list names them)")
        if self.rerun or self.list or self.image is not None or self.points is not None:
            raise ConfigError("--film goes without --rerun, --list, --image and --points")
        shown = film_scene(self.directory, self.scene, film)
        print(f"filmed {shown} keyframes of {self.scene}: {film}")
        return {"records": count, "scene": self.scene, "keyframes": shown, "film": str(film)}

    def _rerun(self, file: Path, count: int) -> Mapping[str, Any]:
        from data_prep.inspect_record import record_scene

        if self.scene is None:
            raise ConfigError("--rerun shows a scene: name it with --scene (--list names them)")
        if self.list or self.image is not None or self.points is not None:
            raise ConfigError("--rerun goes without --list, --image and --points")
        shown = record_scene(self.directory, self.scene, self._range(), file)
        print(f"recorded {shown} keyframes of {self.scene}: {file}")
        return {"records": count, "scene": self.scene, "keyframes": shown, "rerun": str(file)}

    def _range(self) -> tuple[int, int] | None:
        if self.keyframes is None:
            return None
        parts = self.keyframes.split(":")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[0]) >= int(parts[1]):
            raise ConfigError(f"--keyframes {self.keyframes!r} is not FIRST:END, for example 0:10")
        return int(parts[0]), int(parts[1])

    def _list(self, count: int) -> Mapping[str, Any]:
        from data_prep.inspect_record import list_keyframes

        if self.token is not None or self.image is not None or self.points is not None:
            raise ConfigError("--list shows no keyframe: leave --token, --image and --points out")
        keyframes = list_keyframes(self.directory, self.scene)
        width = max(len(each.scene) for each in keyframes)
        for each in keyframes:
            print(f"{each.split:5} {each.scene:{width}} {each.token}")
        return {"records": count, "keyframes": [dataclasses.asdict(each) for each in keyframes]}

    def _write_points(self, file: Path, record: Record, fingerprint: str) -> str:
        # These import jax, which the text and the picture can do without.
        from data_prep.inspect_record import write_ply
        from spacedrive_jax.data.depth_cache import DepthCache, find_cache
        from spacedrive_jax.data.depth_sources import NETWORKS
        from spacedrive_jax.reporting.projection import keyframe_points

        full = None
        if self.depth_cache is not None:
            folder = find_cache(self.directory, set(NETWORKS), self.depth_cache)
            full = DepthCache(folder, fingerprint).read(record["token"]).full
            if not full:
                raise DataError(f"{folder} keeps patch depth only; run add-depth with --full")
        points, colours = keyframe_points(record, full)
        write_ply(file, points, colours)
        print(f"wrote {len(points)} points to {file}")
        return str(file)

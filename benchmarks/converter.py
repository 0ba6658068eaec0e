"""How the converter takes tables as large as v1.0-trainval's: memory, first record, records a second.

The scenes of a small nuScenes folder, real or of `data_prep synthesize`, are repeated under new tokens until
there are as many keyframes as asked for, with as many sweeps between them as nuScenes has: at 34,340
keyframes `sample_data.json` has 1.2 GB. Maps and CAN bus are the small folder's; images and LiDAR are left
out. A converter reads the tables whole and writes records until the time for that is over. Another checkout,
`--against`, converts a table of the same kind in the same run, by turns, and must write the same bytes.

    PYTHONPATH=. python -m benchmarks.converter --source NUSCENES --version v1.0-mini --keyframes 34340
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SWEEPS = 10
"""`sample_data` rows between two keyframes of a sensor, as nuScenes has them on average."""
NAME = "v1.0-scaled"


def tables_of(source: Path, version: str) -> dict[str, list[dict[str, Any]]]:
    """All tables of a small folder."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((source / version).glob("*.json"))}


def write_scaled(source: Path, version: str, keyframes: int, root: Path) -> dict[str, int]:
    """Writes a folder with tables of so many keyframes.

    Args:
        source: a small nuScenes folder.
        version: of its tables.
        keyframes: at least; scenes stay whole.
        root: where to; maps and CAN bus messages are linked.

    Returns:
        Rows of every table.
    """
    small = tables_of(source, version)
    folder = root / NAME
    folder.mkdir(parents=True)
    (root / "can_bus").mkdir()
    if (source / "maps").is_dir():
        (root / "maps").symlink_to((source / "maps").resolve())
    copies = -(-keyframes // len(small["sample"]))
    counts = {}
    for table, rows in small.items():
        with (folder / f"{table}.json").open("w") as file:
            counts[table] = 0
            for line in _scaled(table, rows, copies):
                file.write("[\n" if counts[table] == 0 else ",\n")
                file.write(line)
                counts[table] += 1
            file.write("\n]\n" if counts[table] else "[]")
    for copy, row in itertools.product(range(copies), small["scene"]):
        for kind in ("pose", "route"):
            there = source / "can_bus" / f"{row['name']}_{kind}.json"
            if there.is_file():
                link = root / "can_bus" / f"{_scene_name(row['name'], copy)}_{kind}.json"
                link.symlink_to(there.resolve())
    return counts


_COPIED = ("instance", "sample", "sample_annotation", "sample_data", "ego_pose", "scene")
"""Tables of which every copy has rows of its own; the others hold what all scenes share."""


def _scaled(table: str, rows: list[dict[str, Any]], copies: int) -> Iterator[str]:
    if table not in _COPIED:
        yield from map(_line, rows)
        return
    for copy in range(copies):
        for row in rows:
            made = {field: _renamed(field, value, copy) for field, value in row.items()}
            yield _line(made)
            if table in ("sample_data", "ego_pose"):
                yield from _sweeps(table, _line(made), made["token"], str(made.get("ego_pose_token")))


_OWN = ("token", "sample_token", "ego_pose_token", "instance_token", "scene_token")
_LINKS = (
    *("prev", "next", "first_sample_token", "last_sample_token"),
    *("first_annotation_token", "last_annotation_token"),
)


def _renamed(field: str, value: Any, copy: int) -> Any:
    if field == "name":
        return _scene_name(value, copy)
    return _token(value, copy) if value and field in (*_OWN, *_LINKS) else value


def _scene_name(name: str, copy: int) -> str:
    return name if copy == 0 else f"{name}-{copy}"


def _token(token: str, copy: int, sweep: int = 0) -> str:
    """As long as the old one, which must not end in so many zeros."""
    return token if copy == sweep == 0 else f"{token[:-6]}{copy:04x}{sweep:02x}"


def _sweeps(table: str, line: str, token: str, pose: str) -> Iterator[str]:
    for sweep in range(1, SWEEPS + 1):
        made = line.replace(f'"token": "{token}"', f'"token": "{_token(token, 0, sweep)}"')
        if table == "sample_data":
            made = made.replace(
                f'"ego_pose_token": "{pose}"', f'"ego_pose_token": "{_token(pose, 0, sweep)}"'
            )
            made = made.replace('"is_key_frame": true', '"is_key_frame": false').replace(
                "samples/", "sweeps/"
            )
        yield made


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row)


def _rows(table: Path) -> int:
    """Rows of a table that `write_scaled` wrote: one a line, between brackets."""
    with table.open() as file:
        return max(sum(1 for _ in file) - 2, 0)


def convert(checkout: Path, root: Path, out: Path, workers: int, seconds: float) -> dict[str, float]:
    """Converts with a checkout until that many seconds after the first shard, or to the end.

    Args:
        checkout: whose converter.
        root: the folder.
        out: records.
        workers: processes.
        seconds: after the first shard.

    Returns:
        Seconds to the first record, those of the processor among them, the parent's largest memory in bytes,
        records a second from then on, the processor's seconds a record.
    """
    command = [sys.executable, "-m", "data_prep", "convert", "--dataroot", str(root), "--version", NAME]
    command += ["--out", str(out), "--workers", str(workers), "--missing-images", "empty"]
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    started = time.monotonic()
    running = subprocess.Popen(
        command, cwd=checkout, env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    first, peak = None, 0
    until = float("inf")
    before = group = 0.0
    while running.poll() is None and time.monotonic() < until:
        peak = max(peak, _peak_memory(running.pid))
        if first is None and any(out.glob("*.partial")):
            first = time.monotonic()
            before, until = _group_seconds(running.pid), first + seconds
        group = max(group, _group_seconds(running.pid))  # workers that have ended are not seen any more
        time.sleep(0.1)
    elapsed = time.monotonic() - (first or started)
    whole = running.poll() is not None
    if not whole:
        os.killpg(running.pid, signal.SIGTERM)
    said = running.communicate()[1].decode()
    if whole and running.returncode:
        raise SystemExit(said)
    notes = [json.loads(path.read_text()) for path in (out / "conversion").glob("*array_record*.json")]
    records = sum(note["shard"]["records"] for note in notes)
    return {
        "first": (first or started) - started,
        "first_cost": before,
        "peak": peak,
        "rate": records / elapsed,
        "cost": (group - before) / max(records, 1),
        "records": records,
    }


def _peak_memory(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _group_seconds(group: int) -> float:
    """Processor seconds of the processes of a group that still run."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def main() -> None:
    """Writes tables, converts, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path, help="a small nuScenes folder")
    parser.add_argument("--version", default="v1.0-mini")
    parser.add_argument("--keyframes", type=int, default=34_340)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of writing records")
    parser.add_argument("--against", type=Path, help="another checkout, converts the same")
    parser.add_argument("--only-write", type=Path, help="write the folder here and stop")
    parser.add_argument("--written", type=Path, help="convert the folder that --only-write wrote")
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    if (options.source is None) == (options.written is None):
        parser.error("give either --source or --written")
    if options.only_write is not None:
        print(write_scaled(options.source, options.version, options.keyframes, options.only_write))
        return
    checkouts = {"this": Path.cwd()} | ({"against": options.against} if options.against else {})
    lines = []
    with tempfile.TemporaryDirectory() as made:
        root = options.written or Path(made) / "nuscenes"
        if options.written is None:
            write_scaled(options.source, options.version, options.keyframes, root)
        tables = {path.stem: path for path in (root / NAME).glob("*.json")}
        counts = {name: _rows(path) for name, path in tables.items()}
        sizes = {name: path.stat().st_size / 1e6 for name, path in tables.items()}
        digests = {}
        for name, checkout in checkouts.items():
            out = Path(made) / name
            load = os.getloadavg()[0]
            found = convert(checkout.resolve(), root, out, options.workers, options.seconds)
            digests[name] = {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in out.glob("*array_record-*-of-*")
            }
            lines.append(
                f"| {name} | {found['peak'] / 1e9:.2f} | {found['first']:.0f} | "
                f"{found['first_cost']:.0f} | {found['rate']:.1f} | {1e3 * found['cost']:.0f} | "
                f"{found['records']:.0f} | {load:.1f} |"
            )
            shutil.rmtree(out)
        both = set.intersection(*(set(each) for each in digests.values()))
        same = all(len({each[name] for each in digests.values()}) == 1 for name in both)
    text = "\n".join(
        [
            "# The converter on large tables",
            "",
            f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python "
            f"{platform.python_version()}; "
            f"{counts['sample']:,} keyframes, {counts['sample_data']:,} rows of sample_data "
            f"({sizes['sample_data']:.0f} MB), {counts['sample_annotation']:,} annotations "
            f"({sizes['sample_annotation']:.0f} MB), {counts['ego_pose']:,} poses; "
            f"{options.workers} workers, no images.",
            "",
            "| converter | parent, GB | first record, s | of it processor | records/s | processor, ms each "
            "| records | load |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *lines,
            "",
            f"{len(both)} shards that both wrote: {'the same bytes' if same else 'DIFFERENT'}.",
            "",
        ]
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()

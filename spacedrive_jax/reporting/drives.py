"""The page of a run of drives: scores against other runs, every kind, and pictures of what went wrong.

Pictures are the film from above, the curves, the six views, and runs against each other. Films are moving
SVGs: no script, no network, whoever opens one sees it move. Boxes move by SMIL animations, which every
browser plays inside a page without scripts.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import markupsafe
import numpy as np

from spacedrive_jax.constants import WAYPOINT_STEP
from spacedrive_jax.data.images import decode_photo
from spacedrive_jax.driving.drive import RESULTS, VIEWS, interval, read_summary
from spacedrive_jax.driving.results import read_drive, read_records, read_trace
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.bench2drive import read_results
from spacedrive_jax.io import write_text
from spacedrive_jax.reporting.cameras import STRIP_ORDER, TILE_SIZE, labelled
from spacedrive_jax.reporting.figures import AGENTS, DRIVABLE, GRID, INK, MUTED, PREDICTION, TRUTH
from spacedrive_jax.reporting.page import render_drives
from spacedrive_jax.world.scenario import EGO_AHEAD, EGO_SIZE
from spacedrive_jax.world.vehicle import WHEEL_BASE

MOST_FILMS = 12
"""The worst drives are shown; a page with all of them would take minutes to open."""
PAGE = "drives.html"


@dataclasses.dataclass(frozen=True)
class RunRow:
    """One run in the table."""

    name: str
    drives: int
    driving_score: float
    driving_interval: Sequence[float] | None
    success_rate: float
    pdm_score: float
    pdm_interval: Sequence[float] | None
    parts: Mapping[str, float | None]
    """Of the PDM score; None where no drive has one."""
    failures: Mapping[str, int]
    open_loop_l2: float | None = None
    """Metres, of plans made where the script drove (`driving.episode.open_loop`)."""
    difference: tuple[float, Sequence[float] | None, int] | None = None
    """Of the driving score to the first run on the drives that both have: mean, interval, drives."""


@dataclasses.dataclass(frozen=True)
class FilmRow:
    """One drive that went wrong."""

    title: str
    status: str
    score: float
    infractions: Sequence[str]
    film: str
    """An SVG that moves by itself."""
    curves: str
    """An SVG of speed, steering and acceleration over time."""
    views: str
    """Data address of the six views when it went wrong; empty where the policy did not look."""
    wrong_at: float | None
    """Seconds into the drive."""


@dataclasses.dataclass(frozen=True)
class DrivesPage:
    """All that the page says."""

    title: str
    rows: Sequence[RunRow]
    kinds: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]]
    """Per kind, run to its scores."""
    films: Sequence[FilmRow]
    unsuccessful: int
    """Drives that did not end at their goal, or not without an offence."""
    scatter: str
    """An SVG of all runs, open against closed loop."""

    @property
    def parts(self) -> Sequence[str]:
        """Names of the PDM score's parts: an older run has fewer."""
        return max((list(row.parts) for row in self.rows), key=len, default=[])


def write_page(folder: Path, others: Sequence[Path] = ()) -> Path:
    """Writes `drives.html` into a run of drives.

    Args:
        folder: of the run.
        others: runs to hold it against, on the same scenarios.

    Raises:
        DataError: one of the folders is no finished run of drives.
    """
    runs = [folder, *others]
    names = _names(runs)
    summaries = [read_summary(run) for run in runs]
    rows = run_rows(folder, others)
    kinds = dict.fromkeys(kind for summary in summaries for kind in summary.get("kinds", {}))
    table = [
        (
            kind,
            {
                name: summary.get("kinds", {}).get(kind, {})
                for name, summary in zip(names, summaries, strict=True)
            },
        )
        for kind in kinds
    ]
    films, unsuccessful = _films(folder)
    dots = [
        (row.name, row.open_loop_l2, row.driving_score, row.driving_interval)
        for row in rows
        if row.open_loop_l2 is not None
    ]
    page = DrivesPage(f"Drives of {names[0]}", rows, table, films, unsuccessful, scatter(dots))
    path = folder / PAGE
    write_text(path, render_drives(page))
    return path


def run_rows(folder: Path, others: Sequence[Path] = ()) -> list[RunRow]:
    """A row for every run that drove, the first what the others are held against.

    Args:
        folder: of the run.
        others: runs on the same scenarios.

    Raises:
        DataError: one of the folders is no finished run of drives.
    """
    runs = [folder, *others]
    summaries = [read_summary(run) for run in runs]
    scores = [_scores(run) for run in runs]
    return [
        _row(name, summary, own, scores[0] if number else None)
        for number, (name, summary, own) in enumerate(zip(_names(runs), summaries, scores, strict=True))
        if summary["drives"]
    ]


def score_table(rows: Sequence[RunRow]) -> str:
    """Rows as lines for a terminal, the best driving score first."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  driving score        success, %  PDM score"]
    for row in sorted(rows, key=lambda row: -row.driving_score):
        between = row.driving_interval
        shown = "" if between is None else f" [{between[0]:.1f}, {between[1]:.1f}]"
        score = f"{row.driving_score:.1f}{shown}"
        lines.append(f"{row.name:{width}}  {score:19}  {row.success_rate:10.1f}  {row.pdm_score:9.1f}")
    return "\n".join(lines)


def _names(runs: Sequence[Path]) -> list[str]:
    """What runs are called: the last parts of their paths, as many as tell them apart."""
    for count in range(1, 6):
        names = ["/".join(run.resolve().parts[-count:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return names


def _scores(folder: Path) -> dict[str, float]:
    """Driving score of every drive by its folder's name."""
    found = {}
    for path in sorted((folder / "drives").glob("*/result.json")):
        value = read_drive(path)
        if "scores" in value:
            found[path.parent.name] = float(value["scores"]["score_composed"])
    return found


def _row(
    name: str, summary: Mapping[str, Any], own: Mapping[str, float], first: Mapping[str, float] | None
) -> RunRow:
    parts = dict(summary["pdm_parts"])
    if "extended_comfort" not in parts:
        parts.pop("epdms", None)  # an older run's, of the other parts alone: another score than the rest's
    difference = None
    if first is not None:
        common = sorted(set(own) & set(first))
        if common:
            steps = np.array([own[drive] - first[drive] for drive in common])
            difference = float(steps.mean()), interval(steps), len(common)
    return RunRow(
        name=name,
        drives=summary["drives"],
        driving_score=summary["driving_score"],
        driving_interval=summary["driving_score_interval"],
        success_rate=summary["success_rate"],
        pdm_score=summary["pdm_score"],
        pdm_interval=summary["pdm_score_interval"],
        parts=parts,
        failures=summary["failures"],
        open_loop_l2=summary["open_loop_l2"],
        difference=difference,
    )


def _films(folder: Path) -> tuple[list[FilmRow], int]:
    """The worst drives, and how many were no success."""
    records = read_records(folder / RESULTS)
    successful = {result.route for result in read_results([folder / RESULTS]) if result.success}
    wrong = [record for record in records if record["route_id"].split("_")[1] not in successful]
    wrong.sort(key=lambda record: (record["scores"]["score_composed"], record["index"]))
    rows = []
    by_number = {path.name.split("-")[0]: path for path in (folder / "drives").iterdir()}
    for record in wrong[:MOST_FILMS]:
        drive = by_number.get(f"{record['index']:04d}")
        if drive is None:
            raise DataError(
                f"{folder / RESULTS} has drive {record['index']}, drives/ lacks its folder: drive it again"
            )
        trace = read_trace(drive / "trace.json")
        texts = [
            text
            for kind, found in record["infractions"].items()
            for text in found
            if kind != "min_speed_infractions"
        ]
        rows.append(
            FilmRow(
                drive.name,
                record["status"],
                record["scores"]["score_composed"],
                texts,
                film(trace),
                strip(trace),
                views_strip(drive),
                trace.get("wrong_at"),
            )
        )
    return rows, len(wrong)


EVERY = 2
"""Time steps between two key frames of the animation."""
MARGIN = 25.0
"""Metres shown around the way."""
_WIDTH, _HEIGHT = 520, 90


def film(trace: Mapping[str, Any]) -> markupsafe.Markup:
    """The whole drive, seen from above, played over and over at twice its speed.

    Args:
        trace: what `drive` keeps of a drive (trace.json).
    """
    ego = np.array(trace["ego"], np.float64)
    steps, seconds = len(ego), max(len(ego) * trace["step_s"] / 2, 0.1)
    low, high = ego[:, :2].min(axis=0) - MARGIN, ego[:, :2].max(axis=0) + MARGIN
    width, height = high - low
    parts = [
        f'<svg viewBox="0 0 {width:.1f} {height:.1f}" role="img" aria-label="The drive from above" '
        f'style="background:#fff;width:100%;max-height:520px">',
        # y grows upwards in the world, downwards on the page.
        f'<g transform="translate({-low[0]:.2f} {high[1]:.2f}) scale(1 -1)">',
    ]
    parts += [_polygon(ring, DRIVABLE) for ring in trace["road"]]
    parts += [_line(line, "#ffffff", 0.25, "1 1.5") for line in trace["lanes"]]
    parts.append(_line(trace["route"], "#9ec5e8", 0.6))
    parts.append(_line(ego[:, :2].tolist(), INK, 0.25))
    for other in trace["others"]:
        poses = np.array(other["poses"], np.float64)
        near = np.min(np.abs(poses[:, None, :2] - ego[None, ::10, :2]).max(axis=-1)) < 60.0
        if near:
            parts.append(_box(poses, other["size"], _color(other["category"]), seconds))
    centre = ego[:, :3].copy()
    centre[:, 0] += EGO_AHEAD * np.cos(ego[:, 2])
    centre[:, 1] += EGO_AHEAD * np.sin(ego[:, 2])
    parts.append(_plans(trace, seconds, steps))
    parts.append(_box(centre, EGO_SIZE, INK, seconds))
    parts.append("</g></svg>")
    return markupsafe.Markup("".join(parts))


def _color(category: str) -> str:
    if category.startswith("human."):
        return AGENTS["human"]
    if category in ("vehicle.bicycle", "vehicle.motorcycle"):
        return AGENTS["cycle"]
    return AGENTS["vehicle"] if category.startswith("vehicle.") else AGENTS["other"]


def _box(poses: np.ndarray, size: Sequence[float], color: str, seconds: float) -> str:
    length, width = size[0], size[1]
    rect = (
        f'<rect x="{-length / 2:.2f}" y="{-width / 2:.2f}" width="{length:.2f}" height="{width:.2f}" '
        f'rx="0.3" fill="{color}"/>'
    )
    if len(poses) == 1:
        x, y, yaw = poses[0]
        return f'<g transform="translate({x:.2f} {y:.2f}) rotate({np.degrees(yaw):.1f})">{rect}</g>'
    shown = poses[::EVERY]
    turned = np.degrees(np.unwrap(shown[:, 2]))
    places = ";".join(f"{x:.2f} {y:.2f}" for x, y in shown[:, :2])
    turns = ";".join(f"{angle:.1f}" for angle in turned)
    timing = f'dur="{seconds:.2f}s" repeatCount="indefinite"'
    move = '<g><animateTransform attributeName="transform" type="{}" values="{}" {}/>'
    return f"{move.format('translate', places, timing)}{move.format('rotate', turns, timing)}{rect}</g></g>"


def _plans(trace: Mapping[str, Any], seconds: float, steps: int) -> str:
    """Each plan, seen while it is followed."""
    decisions = [decision for decision in trace["decisions"] if decision["waypoints"]]
    whole = steps * trace["step_s"]
    parts = []
    for number, decision in enumerate(decisions):
        begin = (decision["time"] - decisions[0]["time"]) / whole
        end = (
            (decisions[number + 1]["time"] - decisions[0]["time"]) / whole
            if number + 1 < len(decisions)
            else 1.0
        )
        if not 0 <= begin < end <= 1:
            continue
        x, y, yaw = decision["pose"]
        points = np.array([[0.0, 0.0], *decision["waypoints"]])
        cos, sin = np.cos(yaw), np.sin(yaw)
        placed = np.stack(
            [x + cos * points[:, 0] - sin * points[:, 1], y + sin * points[:, 0] + cos * points[:, 1]], 1
        )
        times, values = ("0", "1") if begin == 0 else (f"0;{begin:.4f}", "0;1")
        if end < 1:
            times, values = f"{times};{end:.4f}", f"{values};0"
        parts.append(
            f'<g opacity="0"><animate attributeName="opacity" calcMode="discrete" values="{values}" '
            f'keyTimes="{times}" dur="{seconds:.2f}s" repeatCount="indefinite"/>'
            f"{_line(placed.tolist(), PREDICTION, 0.5)}</g>"
        )
    return "".join(parts)


def _points(points: Sequence[Sequence[float]]) -> str:
    return " ".join(f"{point[0]:.2f},{point[1]:.2f}" for point in points)


def _line(points: Sequence[Sequence[float]], color: str, width: float, dashes: str = "none") -> str:
    return (
        f'<polyline points="{_points(points)}" fill="none" stroke="{color}" stroke-width="{width}" '
        f'stroke-dasharray="{dashes}"/>'
    )


def _polygon(points: Sequence[Sequence[float]], color: str) -> str:
    return f'<polygon points="{_points(points)}" fill="{color}"/>'


def strip(trace: Mapping[str, Any]) -> markupsafe.Markup:
    """Speed, acceleration and steering over the time of the drive, driven (black) and as planned (blue).

    A plan's speed is drawn over its three seconds, its first acceleration and steering until the next plan.
    """
    ego = np.array(trace["ego"], np.float64)
    times = trace["step_s"] * np.arange(len(ego))
    plans = planned(trace)
    fastest = max([5.0, float(ego[:, 3].max())] + [float(line[:, 1].max()) for line in plans[0]])
    curves = (
        ("speed, m/s", ego[:, 3], 0.0, min(fastest, 30.0)),
        ("acceleration (below the line: braking), m/s²", ego[:, 4], -7.0, 3.0),
        ("steering (above the line: left), °", np.degrees(ego[:, 5]), -35.0, 35.0),
    )
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT * len(curves)}" role="img" aria-label="Curves of the drive">'
    ]
    end = max(float(times[-1]), trace["step_s"])
    for row, (name, values, low, high) in enumerate(curves):
        top = row * _HEIGHT

        def place(
            line: np.ndarray, top: float = top, low: float = low, high: float = high
        ) -> list[list[float]]:
            y = top + _HEIGHT - 8 - (np.clip(line[:, 1], low, high) - low) / (high - low) * (_HEIGHT - 26)
            return np.stack([line[:, 0] / end * _WIDTH, y], axis=1).tolist()

        zero = place(np.array([[0.0, 0.0], [end, 0.0]]))
        parts.append(_line(zero, GRID, 1.0))
        parts += [_line(place(line), PREDICTION, 0.8) for line in plans[row]]
        parts.append(_line(place(np.stack([times, values], axis=1)), INK, 1.5))
        parts.append(
            f'<text x="2" y="{top + 12}" font-size="11" fill="{MUTED}">{name} '
            f"({low:.0f} to {high:.0f})</text>"
        )
    wrong = trace.get("wrong_at")
    if wrong is not None:
        x = wrong / end * _WIDTH
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT * len(curves)}" stroke="{TRUTH}" '
            f'stroke-dasharray="3 3"/>'
        )
    parts.append(
        f'<text x="{_WIDTH}" y="{_HEIGHT * len(curves) - 1}" text-anchor="end" font-size="10" fill="{MUTED}">'
        f"{end:.0f} s</text></svg>"
    )
    return markupsafe.Markup("".join(parts))


def planned(trace: Mapping[str, Any]) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Speeds, accelerations and steering angles (degrees) of all plans, each as (time, value) lines."""
    speeds, accelerations, angles = [], [], []
    decisions = trace["decisions"]
    last = trace["step_s"] * (len(trace["ego"]) - 1)
    for decision in decisions:
        if not decision["waypoints"]:
            continue
        now = decision["time"] - decisions[0]["time"]
        points = np.array([[0.0, 0.0], *decision["waypoints"]])
        speed = np.hypot(*np.diff(points, axis=0).T) / WAYPOINT_STEP
        at = now + WAYPOINT_STEP * (np.arange(len(speed)) + 0.5)
        speeds.append(np.stack([at, speed], axis=1)[at <= last])
        until = np.array([now, now + WAYPOINT_STEP])
        acceleration = (speed[1] - speed[0]) / WAYPOINT_STEP if len(speed) > 1 else 0.0
        accelerations.append(np.stack([until, np.full(2, acceleration)], axis=1))
        x, y = points[min(2, len(points) - 1)]
        reach = x * x + y * y
        # The circle from here through the place one second ahead; who hardly moves plans no steering.
        angle = np.degrees(np.arctan(WHEEL_BASE * 2 * y / reach)) if reach > 1.0 else 0.0
        angles.append(np.stack([until, np.full(2, angle)], axis=1))
    return [line for line in speeds if len(line)], accelerations, angles


def views_strip(folder: Path) -> str:
    """The six views of a drive's folder in two rows, as the data address of a JPEG; empty without any."""
    tiles = []
    for name in STRIP_ORDER:
        path = folder / VIEWS / f"{name}.jpg"
        if not path.is_file():
            return ""
        image = cv2.resize(
            decode_photo(path.read_bytes(), str(path)), TILE_SIZE, interpolation=cv2.INTER_AREA
        )
        tiles.append(labelled(image, name))
    rows = [np.concatenate(tiles[first : first + 3], axis=1) for first in (0, 3)]
    _, data = cv2.imencode(".jpg", np.concatenate(rows)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


Dot = tuple[str, float, float, Sequence[float] | None]
"""A run's name, open-loop L2 in metres, driving score and its interval."""


def scatter(dots: Sequence[Dot]) -> markupsafe.Markup:
    """Driving score over open-loop L2, a dot a run with its interval; empty for fewer than two runs."""
    if len(dots) < 2:
        return markupsafe.Markup("")
    widest = max(max(error for _, error, _, _ in dots) * 1.1, 0.1)
    width, height, left, bottom = 640, 320, 44, 34

    def x(error: float) -> float:
        return left + error / widest * (width - left - 130)

    def y(score: float) -> float:
        return height - bottom - score / 100 * (height - bottom - 12)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Closed loop against open loop">']
    for tick in (0, 25, 50, 75, 100):
        parts.append(_line([[left, y(tick)], [width - 8, y(tick)]], GRID, 1.0))
        parts.append(
            f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end" font-size="11" fill="{MUTED}">'
            f"{tick}</text>"
        )
    parts += [
        f'<text x="{x(error):.1f}" y="{height - 18}" text-anchor="middle" font-size="11" fill="{MUTED}">'
        f"{error:.2f}</text>"
        for error in np.linspace(0.0, widest, 5)
    ]
    for name, error, score, between in dots:
        if between:
            low, high = between
            parts.append(_line([[x(error), y(low)], [x(error), y(high)]], PREDICTION, 1.2))
        parts.append(f'<circle cx="{x(error):.1f}" cy="{y(score):.1f}" r="4.5" fill="{PREDICTION}"/>')
        parts.append(
            f'<text x="{x(error) + 8:.1f}" y="{y(score) + 4:.1f}" font-size="11" fill="{INK}">'
            f"{markupsafe.escape(name)}</text>"
        )
    parts.append(
        f'<text x="{width - 8}" y="{height - 4}" text-anchor="end" font-size="11" fill="{MUTED}">'
        f"across: open-loop L2, m; upwards: driving score</text></svg>"
    )
    return markupsafe.Markup("".join(parts))

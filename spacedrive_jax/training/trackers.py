"""Where the metrics of a run go: JSON Lines, TensorBoard, Weights & Biases.

A tracker is chosen by name (`--train.trackers`). JSON Lines keep the metrics' own names, which `report`
reads; the others get them in groups (`loss/position`, `speed/step_seconds`).
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tensorboardX import SummaryWriter

from spacedrive_jax.config import Config, to_json
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.io import LineFile, is_bucket, put, read_text, twin, write_text
from spacedrive_jax.json_files import parse_json, read_json, write_json
from spacedrive_jax.json_files import to_json as json_line
from spacedrive_jax.training.hosts import is_first_host

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
GROUPS: Mapping[str, str] = {
    "loss": "loss/total",
    "displacement_m": "waypoints/displacement_m",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "step_seconds": "speed/step_seconds",
    "samples_per_second": "speed/samples_per_second",
    "data_wait": "speed/data_wait",
    "data_headroom": "speed/data_headroom",
    "goodput": "speed/goodput",
    "mfu": "speed/mfu",
}
"""Tags of the metrics; `loss_NAME` becomes `loss/NAME`, a name with a slash keeps its group."""


@runtime_checkable
class Tracker(Protocol):
    """Takes the metrics of a run, step by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step.

        Args:
            step: how many steps are done, growing from call to call.
            values: metric to value.
        """

    def close(self) -> None:
        """Writes what is left, and ends."""


def tag(name: str) -> str:
    """The metric's name with its group in front."""
    if name in GROUPS:
        return GROUPS[name]
    if "/" in name:
        return name
    if name.startswith("loss_"):
        return "loss/" + name.removeprefix("loss_")
    return f"other/{name}"


def on_disk(run_dir: Path) -> Path:
    """The folder that trackers write to: the run's, or of a run in a bucket its twin on this machine."""
    return twin(run_dir) if is_bucket(run_dir) else run_dir


class JsonLinesTracker:
    """RUN/metrics.jsonl: an object a step, with the metrics' own names."""

    def __init__(self, run_dir: Path, config: Config, start: int) -> None:
        """Opens the file behind step `start`: lines of steps that will be run again are dropped."""
        file = on_disk(run_dir) / METRICS_FILE
        _drop_behind(run_dir / METRICS_FILE, file, start)
        self._lines = LineFile(file)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line."""
        self._lines.write(json_line({"step": step, **values}))

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


class TensorBoardTracker:
    """Events below RUN/tensorboard, in a folder of the run's name, which TensorBoard shows."""

    def __init__(self, run_dir: Path, config: Config, start: int) -> None:
        """Opens an event file; events of steps behind `start`, which will be run again, are hidden."""
        folder = on_disk(run_dir) / TENSORBOARD / run_dir.resolve().name
        # TensorBoard hides the purged step and what is behind it; that of `start` itself stands.
        self._board = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)
        # TensorBoard shows text as Markdown: four spaces make it a block of code.
        self._board.add_text("config", "    " + to_json(config).replace("\n", "\n    "), start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one event a metric."""
        for name, value in values.items():
            self._board.add_scalar(tag(name), value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._board.close()


class WandbTracker:
    """Weights & Biases; a resumed run goes on under the same id.

    Its files lie below RUN/wandb, those of a run in a bucket on this machine alone.

    What W&B reads from the environment holds: WANDB_MODE=offline needs no network and no key (`wandb sync`
    uploads later), WANDB_PROJECT, WANDB_ENTITY and WANDB_API_KEY say where.
    """

    def __init__(self, run_dir: Path, config: Config, start: int) -> None:
        """Opens the run.

        Raises:
            ConfigError: wandb is not installed, or cannot begin.
        """
        wandb = _import_wandb()
        settings = run_dir / "wandb.json"
        if start and settings.is_file():
            identity = str(read_json(settings)["id"])
        else:
            identity = secrets.token_hex(4)
            write_json(settings, {"id": identity})
        try:
            self._run = wandb.init(
                project=None if "WANDB_PROJECT" in os.environ else "spacedrive_jax",
                name=run_dir.resolve().name,
                id=identity,
                resume="allow",
                dir=str(on_disk(run_dir)),
                config=json.loads(to_json(config)),
            )
        except wandb.errors.Error as error:
            raise _cannot_begin(error) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the metrics of a step."""
        self._run.log({tag(name): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Ends the run, waiting for what is being sent."""
        self._run.finish()


class Trackers:
    """Several trackers as one; on hosts other than the first, none."""

    def __init__(self, run_dir: Path, config: Config, start: int) -> None:
        """Opens the trackers that `config.train.trackers` names.

        Args:
            run_dir: the run's folder.
            config: the run.
            start: steps that are done.

        Raises:
            ConfigError: one of them cannot be used.
        """
        self._run_dir = run_dir
        names = config.train.trackers if is_first_host() else ()
        self._trackers: list[Tracker] = []
        try:
            for name in names:
                self._trackers.append(TRACKERS[name](run_dir, config, start))
        except BaseException:
            self.close()
            raise

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands the metrics to each."""
        for tracker in self._trackers:
            tracker.write(step, values)

    def keep(self) -> None:
        """Brings what is written so far to a run's bucket; on a disk it is there already.

        Raises:
            DataError: the bucket cannot be written.
        """
        if not is_bucket(self._run_dir) or not self._trackers:
            return
        folder = on_disk(self._run_dir)
        for name in (METRICS_FILE, TENSORBOARD, PROFILE):
            for file in ((folder / name), *(folder / name).rglob("*")):
                if file.is_file():
                    put(file, self._run_dir / file.relative_to(folder).as_posix())

    def close(self) -> None:
        """Closes each."""
        for tracker in self._trackers:
            tracker.close()
        self.keep()


TRACKERS: Mapping[str, Callable[[Path, Config, int], Tracker]] = {
    "jsonl": JsonLinesTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}
"""By the names that `--train.trackers` takes."""


def check_trackers(config: Config, *, log_in: bool = True) -> None:
    """Refuses trackers that could not be opened, before a run takes its folder; writes nothing there.

    Args:
        config: the run.
        log_in: hold the key of Weights & Biases against its server, and ask for one at a terminal where there
            is none. WANDB_MODE=offline or disabled needs none.

    Raises:
        ConfigError: weights & Biases is not installed, or has no key that it takes.
    """
    if "wandb" not in config.train.trackers or not is_first_host():
        return
    wandb = _import_wandb()
    if not log_in or os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return
    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise _cannot_begin(error) from error


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            "--train.trackers wandb needs Weights & Biases: pip install -r requirements-wandb.txt"
        ) from error


def _cannot_begin(error: Exception) -> ConfigError:
    return ConfigError(f"Weights & Biases cannot begin ({error}): `wandb login`, or WANDB_MODE=offline")


def _drop_behind(path: Path, file: Path, start: int) -> None:
    """Writes the lines up to a step into the file that will grow; `path` is where the run has them."""
    lines = read_text(path).splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if parse_json(line, path)["step"] <= start:
                kept.append(line)
        except (ValueError, TypeError, KeyError):  # the line that was being written when the process died
            break
    write_text(file, "".join(line + "\n" for line in kept))

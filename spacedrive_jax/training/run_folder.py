"""What a run leaves on disk beside its checkpoints: config, provenance, offending batches."""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import platform
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from spacedrive_jax import __version__, buckets
from spacedrive_jax.config import Config, config_changes, from_json, to_json, to_plain
from spacedrive_jax.data.loader import records_sources
from spacedrive_jax.errors import CheckpointError, ConfigError, DataError, SpaceDriveError
from spacedrive_jax.folders import folder_lock
from spacedrive_jax.io import is_bucket, place, twin, write_text
from spacedrive_jax.json_files import read_json, write_json
from spacedrive_jax.training.checkpoints import steps_of
from spacedrive_jax.training.hosts import Hosts, is_first_host

FREE_TO_CHANGE = (
    "run_dir",
    "mesh.",
    "model.compute.attention",
    "data.records:",
    "model.weights:",
    "data.read_threads",
    "data.prefetch_batches",
    "data.worker_processes",
    "data.cache_in_memory",
    "train.log_every",
    "train.trackers",
    "train.checkpoint_every",
    "train.max_to_keep",
    "train.validate_",
    "train.best_by",
)
"""Fields that a resumed run may change without saying so: they do not change what is learnt.
(What is in the folders of records and weights is held against the checkpoint's fingerprints; how much is
drawn of each of several folders of records is not free.) So may `train.steps` grow."""
OF_A_RUN = (
    "config.json",
    "run.json",
    "best.json",
    "checkpoints",
    "set_aside",
    "metrics.jsonl",
    "tensorboard",
    "wandb",
    "wandb.json",
    "nonfinite",
    "profile",
    "predictions*.json*",
    "counterfactual*.json*",
    "report*.html",
)
"""What lies in a run's folder, and goes when it is overwritten."""
OF_OTHERS = ("provenance.json", "dataset_info.json", "v1.0-*", "weights.json", "model*.safetensors", "*.gguf")
"""What lies in folders of records, of nuScenes and of weights, in which no run begins."""
SEEN_WITHIN = 30.0
"""Seconds that a network's file system may take to show one host what another wrote."""
MARGIN = 64 << 20
"""Bytes that metrics and logs may need beside a checkpoint."""


def lock(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps a run folder for this run; its other hosts come along with the main one.

    Raises:
        SpaceDriveError: another run is writing there.
    """
    return folder_lock(run_dir, take_over=True) if is_first_host() else contextlib.nullcontext()


def check(
    run_dir: Path, config: Config, *, resume: bool, accept_changes: bool = False, overwrite: bool = False
) -> list[str]:
    """Holds a run against what its folder holds already; writes nothing.

    Returns:
        The changes that are accepted.

    Raises:
        SpaceDriveError: the folder holds a run already, or its config differs; or it is no folder for a run.
    """
    if not is_bucket(run_dir):
        if run_dir.exists() and not run_dir.is_dir():
            raise SpaceDriveError(f"--run-dir {run_dir} is no folder: choose another")
        others = [path.name for name in OF_OTHERS for path in sorted(run_dir.glob(name))]
        if others:
            raise SpaceDriveError(
                f"--run-dir {run_dir} holds {others[0]}: records, tables or weights lie there, choose another"
            )
    file = run_dir / "config.json"
    weights = config.model.weights
    if overwrite and weights is not None and place(weights).resolve().is_relative_to(run_dir.resolve()):
        raise SpaceDriveError(
            f"--overwrite would remove model.weights {weights}, which lie in {run_dir}: start elsewhere with "
            "--run-dir"
        )
    if overwrite or not (file.exists() or steps_of(run_dir)):
        return []
    if not file.exists():
        raise SpaceDriveError(
            f"{run_dir} has checkpoints and no config.json, as a run whose removal was interrupted: "
            "--overwrite removes the rest, --run-dir starts elsewhere"
        )
    if not resume:
        raise SpaceDriveError(
            f"{run_dir} holds a run already: --resume continues it, --overwrite replaces it, --run-dir "
            "starts elsewhere"
        )
    then = read_json(file)
    with contextlib.suppress(ConfigError):  # through this version's fields: those it has besides are defaults
        then = json.loads(to_json(from_json(json.dumps(then))))
    found = config_changes(then, json.loads(to_json(config)))
    changes = [change for change in found if not _is_free(change)]
    if changes and not accept_changes:
        raise SpaceDriveError(
            f"{run_dir} was started with another config: {'; '.join(changes)}. Resume with the same one, say "
            "--accept-changes, or start elsewhere with --run-dir"
        )
    if averages := [each for each in changes if each.startswith("train.ema_decay:") and "None" in each]:
        raise SpaceDriveError(
            f"{run_dir} cannot go on with {averages[0]}: its optimiser's state holds the average or does "
            f"not. Start from what it learnt, with --model.weights {run_dir} --run-dir OTHER"
        )
    return changes


OF_A_HOST = (
    "run_dir",
    "data.records",
    "model.weights",
    "data.read_threads",
    "data.prefetch_batches",
    "data.worker_processes",
    "data.cache_in_memory",
)
"""Fields in which the hosts of a run may differ: local copies, and how each reads."""


def shared_metadata(config: Config, start: int, records: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What all hosts of a run must have alike (`Hosts.agree`).

    Args:
        config: of the run.
        start: the step that it begins at, by the checkpoints that this host sees.
        records: their fingerprint.
        flags: how it was started.
    """
    shared = to_plain(config)
    for name in OF_A_HOST:
        *path, last = name.split(".")
        functools.reduce(operator.getitem, path, shared).pop(last)
    weights, sizes = config.model.weights, {}
    if weights is not None and not is_bucket(place(weights)):
        files = [file for file in (place(weights), *place(weights).glob("*")) if file.is_file()]
        sizes = {file.name: file.stat().st_size for file in files}
    return {
        "config": shared,
        "flags": flags,
        "step to begin at": start,
        "records' fingerprint": records,
        "bytes of weights": sizes,
        "version": _versions(),
    }


def require_shared(run_dir: Path, hosts: Hosts) -> None:
    """Refuses a folder that is not the same one on all hosts: orbax would wait for ever for the shards that
    the others write elsewhere.

    Raises:
        SpaceDriveError: on every host, naming those that do not see what the first one writes.
    """
    mark = run_dir / f".shared-{hosts.exchange(uuid.uuid4().hex.encode())[0].decode()}"
    made = hosts.is_first and not run_dir.exists()
    if hosts.is_first:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_text(mark, "")
        except (OSError, SpaceDriveError) as error:
            raise SpaceDriveError(f"the run folder {run_dir} cannot be written: {error}") from error
    hosts.exchange(b"it lies there")
    deadline = time.monotonic() + SEEN_WITHIN
    while not (seen := mark.is_file()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [number for number, each in enumerate(hosts.exchange(b"seen" if seen else b"")) if not each]
    if hosts.is_first:
        mark.unlink()
        if made and not is_bucket(run_dir):  # `claim` makes it, once the run has shown that it can start
            run_dir.rmdir()
    if blind:
        raise SpaceDriveError(
            f"--run-dir {run_dir} is not one folder: what host 0 wrote there is not seen on "
            f"{', '.join(f'host {number}' for number in blind)}. Give a folder of a disk that all hosts "
            "share, or gs://…"
        )


def claim(run_dir: Path, config: Config, *, overwrite: bool = False) -> None:
    """Makes a folder this run's: its config lies there from now on.

    Args:
        run_dir: the folder, which `check` let pass.
        config: the run.
        overwrite: remove the run that is there, and nothing else.

    Raises:
        SpaceDriveError: the folder cannot be written.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("every host has read the run folder")
    if is_first_host():
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if is_bucket(run_dir) and (overwrite or not steps_of(run_dir)):
                _remove_run(twin(run_dir))  # an earlier run's files on this machine
            if overwrite:
                _remove_run(run_dir)
            write_text(run_dir / "config.json", to_json(config))
        except (OSError, SpaceDriveError) as error:
            raise SpaceDriveError(f"the run folder {run_dir} cannot be written: {error}") from error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the run folder is claimed")


def _remove_run(run_dir: Path) -> None:
    """Removes what runs and the commands after them write; the config goes first, so none is half a run."""
    for name in OF_A_RUN:
        for path in run_dir.glob(name):
            if is_bucket(path):
                buckets.remove(path)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_free(change: str) -> bool:
    """Whether a resumed run may have this change (`field: old -> new`) without saying so."""
    name, _, values = change.partition(": ")
    if name == "train.steps":  # going on longer; the schedule is the new length's
        old, _, new = values.partition(" -> ")
        return int(new) > int(old)
    if name == "data.records":  # of several folders, how much is drawn of each is learnt
        old, _, new = values.partition(" -> ")
        return _shares(old) == _shares(new)
    return change.startswith(FREE_TO_CHANGE)


def _shares(records: str) -> list[float]:
    """How much is drawn of each of the folders that `data.records` names."""
    try:
        return [weight for _, weight in records_sources(records)]
    except ConfigError:  # one folder with a comma in its name, which has moved
        return [1.0]


def check_config(
    saved: Mapping[str, Any], config: Config, checkpoint: Path, accepted: Sequence[str] = ()
) -> None:
    """Refuses a checkpoint of another run: one whose metadata holds another config than this run's.

    Args:
        saved: the checkpoint's metadata.
        config: this run's.
        checkpoint: where it is, for the message.
        accepted: changes that the run was resumed with, as run.json has them (`field: old -> new`).

    Raises:
        CheckpointError: naming what differs.
    """
    if not isinstance(saved.get("config"), str):
        raise CheckpointError(f"{checkpoint} is damaged: its metadata lacks the config it was trained with")
    then = json.loads(to_json(from_json(saved["config"])))  # through this version's fields
    allowed = tuple(change.partition(":")[0] + ":" for change in accepted)
    changes = [
        change
        for change in config_changes(then, json.loads(to_json(config)))
        if not (_is_free(change) or change.startswith(allowed))
    ]
    if changes:
        raise CheckpointError(
            f"{checkpoint} belongs to another run (its config -> this run's): {'; '.join(changes)}. Put it "
            "under the run it came from, or, to train on from it, say --accept-changes"
        )


def accepted_changes(run_dir: Path) -> list[str]:
    """The changes that a run was resumed with so far, the oldest first.

    Raises:
        DataError: run.json is damaged.
    """
    file = run_dir / "run.json"
    provenance = read_json(file) if file.is_file() else {}
    changes = provenance.get("accepted_changes") if isinstance(provenance, dict) else None
    return [change for change in changes or [] if isinstance(change, str)]


def lack_of_room(run_dir: Path, checkpoint_bytes: int) -> str | None:
    """Says what is missing where the disk has no room for the next checkpoint beside the one that may be
    under way; None where it has.

    Args:
        run_dir: the run's folder.
        checkpoint_bytes: size of one.
    """
    if is_bucket(run_dir):
        return None
    free, needed = shutil.disk_usage(run_dir).free, 2 * checkpoint_bytes + MARGIN
    if free >= needed:
        return None
    return (
        f"{run_dir} has {free / 1e9:.2f} GB free, and checkpoints of {checkpoint_bytes / 1e9:.2f} GB need "
        f"{needed / 1e9:.2f} GB: make room, then --resume"
    )


def nearest_folder(run_dir: Path) -> Path:
    """A run's folder, or the nearest one above it that exists: whose disk the run will be on."""
    folder = run_dir.resolve()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def lack_of_room_at_the_start(config: Config, checkpoint_bytes: int, *, overwrite: bool) -> str | None:
    """The same for all checkpoints that a run will keep at once, those that lie there already left out.

    Args:
        config: of the run.
        checkpoint_bytes: size of one.
        overwrite: what lies there goes.
    """
    run_dir, settings = config.directory, config.train
    if is_bucket(run_dir):
        return None
    free, held = shutil.disk_usage(nearest_folder(run_dir)).free, 0 if overwrite else len(steps_of(run_dir))
    if overwrite:
        files = [path for path in (run_dir / "checkpoints").rglob("*") if path.is_file()]
        free += sum(path.stat().st_size for path in files)
    # The newest, the best, and the next one, for which the oldest of them goes only when it is whole.
    kept = min(settings.max_to_keep, -(-settings.steps // settings.checkpoint_every))
    beside = 2 if settings.validate_every else 1
    needed = max(kept + beside - held, 2) * checkpoint_bytes + MARGIN
    if free >= needed:
        return None
    fewer = f", or keep fewer than --train.max-to-keep {settings.max_to_keep}"
    return (
        f"{run_dir} has {free / 1e9:.2f} GB free, and the checkpoints of {checkpoint_bytes / 1e9:.2f} GB "
        f"that it will hold need {needed / 1e9:.2f} GB: make room{fewer if settings.max_to_keep > 1 else ''}"
    )


PREDICTED = "predicted"
"""Key of run.json under which `predict` says what the run's predictions are and were made of."""


def note_predictions(run_dir: Path, predictions: Mapping[str, Any]) -> None:
    """Tells `evaluate` and `report` what the run folder's predictions are, and of what.

    Args:
        run_dir: the run's folder.
        predictions: file name, its SHA-256, records folder and fingerprint, split, checkpoint.

    Raises:
        DataError: run.json holds no object.
    """
    file = run_dir / "run.json"
    known = read_json(file) if file.is_file() else {}
    if not isinstance(known, dict):
        raise DataError(f"{file} holds no JSON object: write it again (train --resume)")
    write_json(file, known | {PREDICTED: dict(predictions)}, indent=2)


def write_provenance(run_dir: Path, provenance: dict[str, Any]) -> None:
    """Writes run.json: what is given, devices and versions; what was predicted before stays."""
    file = run_dir / "run.json"
    known = read_json(file) if file.is_file() else {}
    if isinstance(known, dict) and PREDICTED in known:
        provenance = provenance | {PREDICTED: known[PREDICTED]}
    provenance = provenance | {
        "devices": [device.device_kind for device in jax.devices()],
        "hosts": jax.process_count(),
        "versions": _versions(),
    }
    write_json(file, provenance, indent=2)


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
    own = {"spacedrive_jax": __version__, "python": platform.python_version()}
    return own | {package: metadata.version(package) for package in packages}


def save_batch_tokens(run_dir: Path, step: int, tokens: list[str], values: dict[str, float]) -> Path:
    """Writes down which keyframes a step was made of, so that it can be played again; one file a host."""
    file = run_dir / "nonfinite" / f"step_{step}.host_{jax.process_index()}.json"
    write_json(file, {"step": step, "tokens": tokens, "metrics": values}, indent=2)
    return file

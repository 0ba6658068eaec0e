"""`python -m spacedrive_jax predict`: trajectories, or answers about candidates, for a split of records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from spacedrive_jax import io
from spacedrive_jax.bounds import COUNT, FROM_ZERO, POSITIVE, Bound, Bounds
from spacedrive_jax.cli.common import advice_on_memory, mesh_of, on_all_hosts, use_compilation_cache
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Predict(Command):
    """Predict trajectories for a split of records and write them as JSON Lines.

    A line is {"token", "waypoints": [[x, y] x 6] in metres in the ego frame, "text", "status"}, and
    "path": [[x, y] x 20] where the model gives one. With --task think-before-planning the answer reasons in
    words before the trajectory, as it does by default where the run was trained so; they are the line's
    "reasons". With --task counterfactual the model is asked what would happen on every candidate trajectory
    of OmniDrive's test instead: {"token", "Q", "A"} a line, which score-counterfactual reads.

    Example: python -m spacedrive_jax predict --checkpoint runs/demo --records data/records --split val
    --out runs/demo/predictions.jsonl
    """

    when_stopped: ClassVar[str] = "--resume goes on where it stopped"

    checkpoint: Path
    """Run folder (its newest checkpoint), RUN/best (the best validated one), RUN/checkpoints/STEP, or a
    folder of import-weights --from spacedrive."""
    records: Path
    """Records folder written by `python -m data_prep convert`."""
    split: Literal["train", "val", "all"] = "val"
    """Which keyframes to predict."""
    token: tuple[str, ...] = ()
    """Only these keyframes of the split, in this order; by default they replace predictions.part.jsonl."""
    limit: int | None = None
    """Only the first so many keyframes of the split; by default they replace predictions.part.jsonl."""
    step: int | None = None
    """Of a run folder: the checkpoint to take instead of the newest."""
    task: Literal["planning", "think-before-planning", "counterfactual"] | None = None
    """Plan, plan behind words over the scene, or answer the counterfactual test; by default the planning that
    the run was trained for."""
    language_data: Path | None = None
    """For counterfactual: folder of OmniDrive's language data (its eval_cf); the run's by default."""
    out: Path | None = None
    """File to write; predictions.jsonl or counterfactual.jsonl in the run folder by default (an imported
    checkpoint needs a name)."""
    batch_size: int = 8
    """Samples per step, over all devices."""
    max_new_tokens: int | None = None
    """Longest answer, tokens; by default the published 100, more where the model gives a path."""
    decoding: Literal["one-pass", "token-by-token"] = "one-pass"
    """Run the whole framed answer at once and check it, or generate token by token; same answers."""
    repetition_penalty: float = 1.0
    """Penalty on ids already seen; released Qwen settings carry 1.05, SpaceDrive's results use none."""
    average: tyro.conf.FlagCreatePairsOff[bool] = False
    """Predict with the moving average of the weights that `--train.ema-decay` keeps."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with an interrupted prediction of the same file (or start, when there is none)."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the file if it exists, or start an interrupted one anew."""
    mesh: str | None = None
    """Devices along each axis, such as data=4,fsdp=2 (one may be -1). By default the run's where it fits the
    devices there are, else all of them along fsdp."""
    coordinator: str | None = None
    """Several hosts: `auto` on SLURM, GKE and Cloud TPU, or HOST:PORT of the first host. Each prepares its
    share, the first one writes the file."""
    num_processes: int | None = None
    """Hosts, with --coordinator HOST:PORT."""
    process_id: int | None = None
    """This host, from 0, with --coordinator HOST:PORT."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs between runs; by default JAX_COMPILATION_CACHE_DIR, else the user's
    cache folder."""

    BUCKETS: ClassVar[tuple[str, ...]] = (
        "checkpoint",
        "records",
        "language_data",
        "out",
        "compilation_cache",
    )
    WRITES: ClassVar[tuple[str, ...]] = ("out",)
    BOUNDS: ClassVar[Bounds] = {
        "limit": COUNT,
        "step": FROM_ZERO,
        "batch_size": COUNT,
        "max_new_tokens": Bound(1, 4096),
        "repetition_penalty": POSITIVE,
        "num_processes": COUNT,
        "process_id": FROM_ZERO,
    }

    @on_all_hosts
    def run(self) -> Mapping[str, Any]:
        """Predicts; see `spacedrive_jax.inference.predict.predict` and `.questions`."""
        if self.resume and self.overwrite:
            raise ConfigError("--resume goes on with a file and --overwrite replaces it: give one of the two")
        part = bool(self.token) or self.limit is not None
        if self.token and self.limit is not None:
            raise ConfigError("--token names keyframes and --limit counts them: give one of the two")
        if self.language_data is not None and self.task != "counterfactual":
            raise ConfigError("--language-data goes with --task counterfactual")
        if part and self.task == "counterfactual":
            raise ConfigError("--token and --limit go with planning, not with --task counterfactual")
        if self.step is not None:
            checkpoint = self.checkpoint / "checkpoints" / str(self.step)
            return dataclasses.replace(self, checkpoint=checkpoint, step=None).run()
        use_compilation_cache(self.compilation_cache)
        from spacedrive_jax.training.hosts import connect, is_first_host

        connect(self.coordinator, self.num_processes, self.process_id)
        from spacedrive_jax.inference.predict import PlanningTask, predict
        from spacedrive_jax.interop.weights_folder import is_imported
        from spacedrive_jax.training.checkpoints import locate
        from spacedrive_jax.training.trained_folder import is_trained_folder

        if self.out is None and (is_imported(self.checkpoint) or is_trained_folder(self.checkpoint)):
            raise ConfigError(f"{self.checkpoint} is no run folder to write to: give --out FILE")
        if self.task == "counterfactual":
            return self._ask(self.out or locate(self.checkpoint)[0] / "counterfactual.jsonl")
        tasks: dict[str | None, PlanningTask] = {
            "planning": "planning",
            "think-before-planning": "think_before_planning",
        }
        name = "predictions.part.jsonl" if part else "predictions.jsonl"
        out = self.out or locate(self.checkpoint)[0] / name
        if part and self.out is not None and out.exists() and not self.overwrite:
            raise ConfigError(
                f"{out} exists, and would hold the keyframes of --token or --limit alone: another --out, "
                "or none for predictions.part.jsonl, or --overwrite"
            )
        with advice_on_memory("lower --batch-size"):
            result = predict(
                self.checkpoint,
                self.records,
                self.split,
                out,
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
                decoding=self.decoding,
                repetition_penalty=self.repetition_penalty,
                average=self.average,
                resume=self.resume,
                overwrite=self.overwrite or (part and self.out is None and not self.resume),
                mesh=mesh_of(self.mesh),
                tokens=self.token,
                limit=self.limit,
                task=tasks.get(self.task),
            )
        if self.out is None and not part and is_first_host():
            _note_predictions(out, self.records, result.made_of)
        rate = result.samples / max(result.seconds, 1e-9)
        print(f"{result.samples} samples, {result.unparsed} unparsed, {rate:.1f} a second: {out}")
        if result.unparsed == result.samples > 0:
            print("no answer holds a trajectory: the model has not learnt to give one (train longer)")
        elif self.out is None and not part:
            print(f"next: python -m spacedrive_jax evaluate {out.parent}, then report {out.parent}")
        return {
            "file": str(out),
            "samples": result.samples,
            "unparsed": result.unparsed,
            "in_one_pass": result.in_one_pass,
            "samples_per_second": rate,
        }

    def _ask(self, out: Path) -> Mapping[str, Any]:
        from spacedrive_jax.inference.predict import answer_counterfactual

        with advice_on_memory("lower --batch-size"):
            result = answer_counterfactual(
                self.checkpoint,
                self.records,
                self.split,
                self.language_data,
                out,
                batch_size=self.batch_size,
                max_new_tokens=100 if self.max_new_tokens is None else self.max_new_tokens,
                repetition_penalty=self.repetition_penalty,
                average=self.average,
                resume=self.resume,
                overwrite=self.overwrite,
                mesh=mesh_of(self.mesh),
            )
        print(
            f"{result.questions} questions about {result.keyframes} keyframes, {result.without_candidates} "
            f"keyframes without candidates: {out}"
        )
        return {
            "file": str(out),
            "samples": result.questions,
            "keyframes": result.keyframes,
            "without_candidates": result.without_candidates,
            "samples_per_second": result.questions / max(result.seconds, 1e-9),
        }


def _note_predictions(out: Path, records: Path, made_of: Mapping[str, Any]) -> None:
    """Tells `evaluate`, `report` and model cards what a run folder's predictions are, and of what."""
    from spacedrive_jax.training.run_folder import note_predictions

    checkpoint = made_of["checkpoint"]
    metadata = {
        "file": out.name,
        "sha256": io.file_sha256(out),
        "records": str(records.resolve()),
        "records_fingerprint": made_of["records"],
        "split": made_of["split"],
        "checkpoint": checkpoint["path"],
        "trainable_fingerprint": checkpoint["trainable_fingerprint"],
        "average": made_of["average"],
    }
    note_predictions(out.parent, metadata)

"""`python -m spacedrive_jax`: train, predict, evaluate, report."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from spacedrive_jax import console
from spacedrive_jax.cli.aot import Aot
from spacedrive_jax.cli.common import use_compilation_cache
from spacedrive_jax.cli.evaluate import Evaluate
from spacedrive_jax.cli.report import Report
from spacedrive_jax.cli.score_bench2drive import ScoreBench2Drive
from spacedrive_jax.cli.score_counterfactual import ScoreCounterfactual
from spacedrive_jax.cli.serve import Serve
from spacedrive_jax.cli.verify import Verify
from spacedrive_jax.cli.weights import ExportWeights, ImportWeights
from spacedrive_jax.console import Command
from spacedrive_jax.io import read_json, write_json


@dataclasses.dataclass(frozen=True)
class Train(Command):
    """Train a model from a config; every field of the config is a flag of its own.

    Writes checkpoints, metrics.jsonl, TensorBoard events and the resolved config to the run folder.
    `train CONFIG --help` lists the fields of CONFIG with their values.

    Example: python -m spacedrive_jax train demo --data.records data/records --train.steps 1000
    """

    when_stopped: ClassVar[str] = "--resume goes on where it stopped"

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A preset in configs/ by name, a .py file that defines `config`, or a config.json of a run."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the newest checkpoint of the run folder (or start, when there is none yet)."""
    step: int | None = None
    """With --resume: go on from this checkpoint instead of the newest; later ones move to RUN/set_aside."""
    accept_changes: tyro.conf.FlagCreatePairsOff[bool] = False
    """Resume although config or records differ from the run's."""
    skip_nonfinite: int = 0
    """Leave out up to this many steps whose loss or gradient is nan or infinite."""
    profile: tuple[int, int] | None = None
    """First step and number of steps to trace with jax's profiler, into RUN/profile."""
    coordinator: str | None = None
    """Several hosts: `auto` on SLURM, GKE and Cloud TPU, or HOST:PORT of the first host."""
    host_count: int | None = None
    """Hosts of the run, with --coordinator HOST:PORT."""
    host_index: int | None = None
    """This host, from 0, with --coordinator HOST:PORT."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs between runs; by default JAX_COMPILATION_CACHE_DIR, else the user's
    cache folder."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> Mapping[str, Any]:
        """Trains; see `spacedrive_jax.training.train.train`."""
        from spacedrive_jax.config import Config, load_preset

        config = tyro.cli(
            tyro.conf.OmitSubcommandPrefixes[Config],
            prog=f"python -m spacedrive_jax train {self.config}",
            description=f"Every field of the config {self.config!r} and its value there.",
            default=load_preset(self.config),
            args=list(self.overrides),
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
        if self.step is not None and not self.resume:
            raise console.UserError("--step says where to go on: give --resume with it")
        use_compilation_cache(self.compilation_cache)
        from spacedrive_jax.training.sharding import connect
        from spacedrive_jax.training.train import ProfileWindow, train

        connect(self.coordinator, self.host_count, self.host_index)
        with _advice_on_memory(_TRAIN_LESS):
            result = train(
                config,
                resume=self.resume,
                step=self.step,
                accept_changes=self.accept_changes,
                skip_nonfinite=self.skip_nonfinite,
                profile=None if self.profile is None else ProfileWindow(*self.profile),
            )
        how = "trained" if result.finished else "stopped by SIGTERM and saved; --resume goes on:"
        print(f"{how} {result.step} steps in {result.seconds:.0f} s; run folder {result.run_dir}")
        return {
            "run_dir": str(result.run_dir),
            "checkpoint": str(result.run_dir / "checkpoints" / str(result.step)),
            "step": result.step,
            "loss": result.loss,
            "seconds": result.seconds,
            "finished": result.finished,
            "skipped": result.skipped,
        }


@dataclasses.dataclass(frozen=True)
class Predict(Command):
    """Predict trajectories for a split of records and write them as JSON Lines.

    A line is {"token", "waypoints": [[x, y] x 6] in metres in the ego frame, "text", "status"}, and
    "path": [[x, y] x 20] where the model gives one. With --task counterfactual the model is asked what would
    happen on every candidate trajectory of OmniDrive's test instead: {"token", "Q", "A"} a line, which
    score-counterfactual reads.

    Example: python -m spacedrive_jax predict --checkpoint runs/demo --records data/records --split val
    --out runs/demo/predictions.jsonl
    """

    when_stopped: ClassVar[str] = "--resume goes on where it stopped"

    checkpoint: Path
    """Run folder (its newest checkpoint), RUN/checkpoints/STEP, or a folder of import-weights --from
    spacedrive."""
    records: Path
    """Records folder written by `python -m data_prep convert`."""
    split: Literal["train", "val", "all"] = "val"
    """Which keyframes to predict."""
    step: int | None = None
    """Of a run folder: the checkpoint to take instead of the newest."""
    task: Literal["planning", "counterfactual"] = "planning"
    """Plan, or answer the counterfactual test."""
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
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs between runs; by default JAX_COMPILATION_CACHE_DIR, else the user's
    cache folder."""

    def run(self) -> Mapping[str, Any]:
        """Predicts; see `spacedrive_jax.inference.predict.predict` and `.questions`."""
        if self.step is not None:
            checkpoint = self.checkpoint / "checkpoints" / str(self.step)
            return dataclasses.replace(self, checkpoint=checkpoint, step=None).run()
        use_compilation_cache(self.compilation_cache)
        from spacedrive_jax.inference.predict import predict
        from spacedrive_jax.interop.trained_parts import is_imported
        from spacedrive_jax.training.checkpoints import locate

        if self.out is None and is_imported(self.checkpoint):
            raise console.UserError(f"{self.checkpoint} is no run folder to write to: give --out FILE")
        if self.task == "counterfactual":
            return self._ask(self.out or locate(self.checkpoint)[0] / "counterfactual.jsonl")
        out = self.out or locate(self.checkpoint)[0] / "predictions.jsonl"
        with _advice_on_memory("lower --batch-size"):
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
                overwrite=self.overwrite,
            )
        if self.out is None:
            _note_predictions(out.parent, self.records, self.split, out)
        rate = result.samples / max(result.seconds, 1e-9)
        print(f"{result.samples} samples, {result.unparsed} unparsed, {rate:.1f} a second: {out}")
        return {
            "file": str(out),
            "samples": result.samples,
            "unparsed": result.unparsed,
            "in_one_pass": result.in_one_pass,
            "samples_per_second": rate,
        }

    def _ask(self, out: Path) -> Mapping[str, Any]:
        from spacedrive_jax.inference.questions import answer_counterfactual

        with _advice_on_memory("lower --batch-size"):
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


_TRAIN_LESS = (
    "keep less for the backward pass (--model.compute.remat full), cut the batch into pieces "
    "(--train.accumulation 2) or over more devices (--mesh.fsdp); `aot CONFIG --search` tries them without "
    "the machine"
)


@contextlib.contextmanager
def _advice_on_memory(advice: str) -> Iterator[None]:
    """Says what to do where the devices have too little memory."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0][:300]
        raise console.UserError(f"the devices ran out of memory ({said}): {advice}") from error


def _note_predictions(run_dir: Path, records: Path, split: str, out: Path) -> None:
    """Tells `report` what the run folder's predictions were made on."""
    file = run_dir / "run.json"
    facts = read_json(file) if file.is_file() else {}
    if not isinstance(facts, dict):
        raise console.UserError(f"{file} holds no JSON object: write it again (train --resume)")
    facts |= {"records": str(records.resolve()), "split": split, "predictions": out.name}
    write_json(file, facts, indent=2)


COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "predict": Predict,
    "serve": Serve,
    "evaluate": Evaluate,
    "score-bench2drive": ScoreBench2Drive,
    "score-counterfactual": ScoreCounterfactual,
    "report": Report,
    "import-weights": ImportWeights,
    "export-weights": ExportWeights,
    "verify": Verify,
    "aot": Aot,
}
DESCRIPTION = (
    "SpaceDrive in JAX. Prepare data with `python -m data_prep`; then train, predict, evaluate, report."
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    program = "python -m spacedrive_jax"
    if len(argv) > 1 and argv[0] == "train" and not argv[1].startswith("-"):
        # The config's fields are flags too, but which there are is known only once it is loaded.
        help_flags = [argument for argument in argv[2:] if argument in ("-h", "--help")]
        arguments = [argument for argument in argv[1:] if argument not in help_flags]
        command, rest = tyro.cli(Train, prog=f"{program} train", args=arguments, return_unknown_args=True)
        command = dataclasses.replace(command, overrides=(*rest, *help_flags))
        return console.finish(command.run, as_json=command.json, debug=command.debug)
    return console.main(program, DESCRIPTION, COMMANDS, argv)

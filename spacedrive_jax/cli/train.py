"""`python -m spacedrive_jax train`: a run from a config."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from spacedrive_jax import console
from spacedrive_jax.bounds import COUNT, FROM_ZERO, Bounds
from spacedrive_jax.cli.common import advice_on_memory, on_all_hosts, use_compilation_cache
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError

if TYPE_CHECKING:
    from spacedrive_jax.config import Config

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Train(Command):
    """Train a model from a config; every field of the config is a flag of its own.

    Writes checkpoints, metrics.jsonl, TensorBoard events and the resolved config to the run folder, from its
    first step on: what cannot start leaves nothing behind. Ctrl-C, SIGTERM and SIGHUP (a terminal that is
    closed) save first.
    `train --list` names the presets, `train CONFIG --help` lists the fields of CONFIG with their values.

    Example: python -m spacedrive_jax train demo --data.records data/records --train.steps 1000
    """

    when_stopped: ClassVar[str] = "--resume goes on where it stopped"

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A preset by name (`train --list` shows them), a .py file that defines `config`, or a config.json of a
    run."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the newest checkpoint of the run folder (or start, when there is none yet)."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the run that the folder holds, once the new one has done its first step."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Look at every keyframe (tokens, images, depth), at validation, weights, memory and disk, say what the
    run would be and what would stop it, and write nothing."""
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
    num_processes: int | None = None
    """Hosts of the run, with --coordinator HOST:PORT."""
    process_id: int | None = None
    """This host, from 0, with --coordinator HOST:PORT."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs between runs; by default JAX_COMPILATION_CACHE_DIR, else the user's
    cache folder."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    BUCKETS: ClassVar[tuple[str, ...]] = ("compilation_cache",)
    BOUNDS: ClassVar[Bounds] = {
        "step": FROM_ZERO,
        "skip_nonfinite": FROM_ZERO,
        "profile": FROM_ZERO,
        "num_processes": COUNT,
        "process_id": FROM_ZERO,
    }

    @on_all_hosts
    def run(self) -> Mapping[str, Any]:
        """Trains; see `spacedrive_jax.training.train.train`."""
        from spacedrive_jax.config import Config, load_config

        if self.profile is not None and (self.profile[0] < 0 or self.profile[1] < 1):
            raise ConfigError(
                f"--profile {self.profile[0]} {self.profile[1]}: give a first step from 0 and 1 or more steps"
            )
        if self.resume and self.overwrite:
            raise ConfigError("--resume goes on with a run and --overwrite replaces it: give one of them")
        if self.accept_changes and not self.resume:
            raise ConfigError("--accept-changes says how to go on with a run: give --resume with it")
        preset = load_config(self.config)
        config = console.parse(
            lambda: tyro.cli(
                tyro.conf.OmitSubcommandPrefixes[Config],
                prog=f"python -m spacedrive_jax train {self.config}",
                description=f"Every field of the config {self.config!r} and its value there.",
                default=preset,
                args=_spelled_out(self.overrides),
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
            )
        )
        from spacedrive_jax.training.weights import with_weights

        if idle := _idle(preset, config):
            # A run that began with such a flag has it in its config, and needs it to go on.
            if not self.resume:
                raise ConfigError(idle)
            log.warning("%s", idle)
        config = with_weights(config, preset, resume=self.resume)
        if self.step is not None and not self.resume:
            raise ConfigError("--step says where to go on: give --resume with it")
        use_compilation_cache(self.compilation_cache)
        from spacedrive_jax.evaluation.validation import train
        from spacedrive_jax.training.hosts import connect
        from spacedrive_jax.training.throughput import ProfileWindow

        connect(self.coordinator, self.num_processes, self.process_id)
        if self.dry_run:
            return self._look(config)
        with advice_on_memory(functools.partial(_fitting, config)):
            result = train(
                config,
                resume=self.resume,
                step=self.step,
                accept_changes=self.accept_changes,
                overwrite=self.overwrite,
                skip_nonfinite=self.skip_nonfinite,
                profile=None if self.profile is None else ProfileWindow(*self.profile),
            )
        taken = result.step - result.start
        if not taken:
            how = f"nothing left to do: {result.run_dir} has all of its {result.step} steps (more with "
            print(how + f"--train.steps {2 * result.step} --resume)")
        else:
            behind = f" behind step {result.start}" if result.start else ""
            how = "trained" if result.finished else "stopped and saved; --resume goes on. Trained"
            print(
                f"{how} {taken} steps{behind} in {result.seconds:.0f} s; run folder {result.run_dir}"
                + (f"; best of all validated: step {result.best.step}" if result.best is not None else "")
            )
        if result.finished and "," not in config.data.records:
            best = "/best" if result.best is not None else ""
            print(
                f"next: python -m spacedrive_jax predict --checkpoint {result.run_dir}{best} --records "
                f"{config.data.records}"
            )
        return {
            "run_dir": str(result.run_dir),
            "checkpoint": str(result.run_dir / "checkpoints" / str(result.step)),
            "step": result.step,
            "loss": result.loss,
            "seconds": result.seconds,
            "finished": result.finished,
            "skipped": result.skipped,
            "start": result.start,
            "best": None if result.best is None else dataclasses.asdict(result.best),
        }

    def _look(self, config: Config) -> Mapping[str, Any]:
        """Says what the run would be."""
        from spacedrive_jax.aot.search import device_memory, least_bytes
        from spacedrive_jax.evaluation.validation import Validation
        from spacedrive_jax.training.preflight import describe, preflight

        seen = preflight(
            config,
            resume=self.resume,
            step=self.step,
            accept_changes=self.accept_changes,
            overwrite=self.overwrite,
            validation=functools.partial(Validation.where_possible, keep=False),
        )
        print(describe(config, seen))
        least, memory, problems = least_bytes(config), device_memory(), list(seen.problems)
        if memory is not None:
            print(f"  a step takes at least {least / 1e9:.2f} GB of a device's {memory / 1e9:.1f} GB")
            if least > memory:
                problems.append(f"a device has too little memory for a step: {_TRAIN_LESS}")
        if problems:
            raise ConfigError("; ".join(problems))
        print("nothing found that would stop it")
        return dataclasses.asdict(seen) | {"least_bytes": least, "device_bytes": memory}


_TRAIN_LESS = (
    "keep less for the backward pass (--model.compute.remat full), cut the batch into pieces "
    "(--train.grad-accum-steps 2) or over more devices (--mesh.data 1 --mesh.fsdp -1), store the frozen base "
    "in fewer bits (--model.compute.base-quantization int8)"
)


def _fitting(config: Config) -> str:
    """What would fit, by the same compiler's account of smaller steps."""
    from spacedrive_jax.aot.search import what_fits

    return what_fits(config) or _TRAIN_LESS


def _idle(preset: Config, config: Config) -> str:
    """Says which flags change what nothing reads in this run; empty where there are none."""
    from spacedrive_jax.config import config_changes, to_plain

    model, data, train = config.model, config.data, config.train
    disturb = data.depth.disturb
    drawn = bool(disturb.noise or disturb.holes)
    faulty = drawn or bool(disturb.blur or disturb.shift or disturb.scale != 1.0)
    encoder, vae = model.encoder.kind, model.decoder.kind == "vae"
    acts = {
        "model.lora.": (model.use_lora, "model.use_lora True"),
        # An `mlp` encodes past positions in waves all the same (fidelity Q34).
        "model.encoder.frequency_scaling": (encoder != "nerf", "a model.encoder.kind other than nerf"),
        "model.encoder.fone_width": (encoder == "fone", "model.encoder.kind fone"),
        "model.decoder.latent_size": (vae, "model.decoder.kind vae"),
        "model.decoder.with_current": (vae, "model.decoder.kind vae"),
        "model.decoder.grid.": (model.decoder.is_grid, "a model.decoder.kind that searches the grid"),
        "model.position_input_training": (model.position_input, "model.position_input True"),
        "data.depth.disturb.cameras": (faulty, "a fault beside it (data.depth.disturb.holes 0.5)"),
        "data.depth.disturb.seed": (drawn, "data.depth.disturb.noise or data.depth.disturb.holes"),
        "train.vae_weight": (vae, "model.decoder.kind vae"),
        "train.path_weight": (model.path_points > 0, "model.path_points"),
        "train.huber_delta": (train.position_loss == "huber", "train.position_loss huber"),
        "train.validate_keyframes": (train.validate_every > 0, "train.validate_every"),
        "train.best_by": (train.validate_every > 0, "train.validate_every"),
    }
    changed = [change.split(":")[0] for change in config_changes(to_plain(preset), to_plain(config))]
    found = [
        f"{name} does nothing without {needs}"
        for name in changed
        for prefix, (active, needs) in acts.items()
        if not active and name.startswith(prefix)
    ]
    return f"{'; '.join(found)}: set that too, or leave it out" if found else ""


def _spelled_out(overrides: Sequence[str]) -> list[str]:
    """The flags of a config; `--model.random-base` alone says True."""
    given = list(overrides)
    for place in range(len(given) - 1, -1, -1):
        alone = place + 1 == len(given) or given[place + 1].startswith("--")
        if given[place].replace("_", "-") == "--model.random-base" and alone:
            given.insert(place + 1, "True")
    return given


def list_presets() -> Mapping[str, Any]:
    """Prints the presets that `train CONFIG` knows by name, by family of runs."""
    from spacedrive_jax.config import preset_groups

    groups = preset_groups()
    for group, (about, presets) in groups.items():
        print(f"{group}: {about}")
        for name in presets:
            print(f"  {name}")
    return {group: list(presets) for group, (_, presets) in groups.items()}


def parse_train(arguments: list[str], program: str) -> Train:
    """Reads `train CONFIG …`, whose flags are its own and the fields of the config.

    Which fields there are is known only once the config is loaded, so that they (and `--help`, which is to
    list them) are kept for `Train.run`.

    Args:
        arguments: what follows `train`; the first is the config.
        program: for the help page.
    """
    help_flags = [argument for argument in arguments[1:] if argument in ("-h", "--help")]
    known = [argument for argument in arguments if argument not in help_flags]
    command, rest = tyro.cli(Train, prog=program, args=known, return_unknown_args=True)
    return dataclasses.replace(command, overrides=(*rest, *help_flags))

"""`python -m spacedrive_jax import-weights` and `export-weights`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from spacedrive_jax.bounds import COUNT, FROM_ZERO, Bound, Bounds
from spacedrive_jax.cli.common import mesh_of, on_all_hosts
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.io import local


@dataclasses.dataclass(frozen=True)
class ImportWeights(Command):
    """Check released weights, add the two coordinate tokens, and bring all into one weights folder.

    The folder holds the base model and its tokenizer as transformers has them (in their own types), adapters
    as PEFT has them, and weights.json with a fingerprint. `model.weights` and `data.tokenizer` of a config
    take it; transformers and PEFT load it too. Missing, unknown or misshapen tensors are named, all at once.
    A published SpaceDrive checkpoint brings its trained heads too: `predict --checkpoint` takes the folder,
    and a training run starts from them.

    Example: python -m spacedrive_jax import-weights --from hf Qwen2.5-VL-7B-Instruct --out weights/qwen-7b
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A transformers checkpoint (hf) or an adapter (peft), folders; a published iter_N.pth (spacedrive); a
    LLaMA language model such as SmolLM2, to be that of a SmolVLM with a fresh tower (gguf)."""
    format: Annotated[Literal["hf", "peft", "spacedrive", "gguf"], tyro.conf.arg(name="from")]
    """What the weights are."""
    out: Path
    """Folder to create; one that exists is never touched."""
    base: Path | None = None
    """For adapters: their base checkpoint, where their config does not name a folder. For spacedrive: a
    folder with the config.json and the tokenizer of its base, which the file has not."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, where the checkpoint has none."""
    published_config: Path | None = None
    """For spacedrive: the published config (.py, or JSON of the model's arguments) it was trained with, where
    the checkpoint does not carry it. Without one, --config says what leaves no trace in the tensors."""
    config: str | None = None
    """For spacedrive: a preset, or a .py file that defines `config`, whose data and training settings the
    checkpoint is to be used with; the published ones by default. For gguf: one on a SmolVLM, whose tower the
    fresh one is like; that of SmolVLM-256M by default."""
    add_tokens: bool = True
    """Add the coordinate tokens, their rows in embedding and head being the mean of all others."""
    max_shard_gigabytes: float = 2.0
    """Largest tensor file; about twice this is held in memory."""

    BUCKETS: ClassVar[tuple[str, ...]] = ("source", "out", "base", "tokenizer")
    BOUNDS: ClassVar[Bounds] = {"max_shard_gigabytes": Bound(1e-6)}

    def run(self) -> Mapping[str, Any]:
        """Imports; see `spacedrive_jax.interop.importing`."""
        from spacedrive_jax.interop.gguf import import_gguf
        from spacedrive_jax.interop.importing import READERS, ImportOptions
        from spacedrive_jax.interop.spacedrive import import_spacedrive

        options = ImportOptions(
            None if self.base is None else local(self.base),
            None if self.tokenizer is None else local(self.tokenizer),
            self.add_tokens,
            int(self.max_shard_gigabytes * 1000**3),
            self.published_config,
            self.config,
        )
        readers = {**READERS, "spacedrive": import_spacedrive, "gguf": import_gguf}
        outcome = readers[self.format](local(self.source), self.out, options)
        print(f"imported {outcome['tensors']} tensors, {outcome['parameters']:,} parameters: {self.out}")
        for note in outcome.get("notes", ()):
            print(f"note: {note}")
        return {"out": str(self.out), **outcome}


@dataclasses.dataclass(frozen=True)
class ExportWeights(Command):
    """Write weights for transformers (adapters folded in), PEFT (adapters alone), the published code, or as
    one folder of safetensors that holds a whole trained SpaceDrive.

    `spacedrive` takes back what --from spacedrive brought in, bit for bit. `safetensors` is for handing a
    trained run on: `show`, `predict`, `drive` and `serve` take the folder as their checkpoint.

    From a weights folder, a transformers checkpoint, or a training run. Of a run, hf and peft can express the
    vision-language model alone; the modules that stay behind are named.

    Example: python -m spacedrive_jax export-weights --to hf runs/demo --out exported
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Weights folder, transformers checkpoint, run folder, RUN/checkpoints/STEP, or what --to safetensors
    wrote of one."""
    format: Annotated[Literal["hf", "peft", "spacedrive", "safetensors"], tyro.conf.arg(name="to")]
    """Whom the weights are for."""
    out: Path
    """Folder (for spacedrive: file) to create; one that exists is never touched."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """For safetensors: type to store the trained numbers in; only float32 keeps their bits."""
    average: tyro.conf.FlagCreatePairsOff[bool] = False
    """For safetensors: the moving average of the weights that `--train.ema-decay` keeps."""
    mesh: str | None = None
    """Of a run: devices along each axis, such as data=1,fsdp=8. By default the run's where it fits the
    devices there are, else all of them along fsdp."""
    coordinator: str | None = None
    """Several hosts: `auto` on SLURM, GKE and Cloud TPU, or HOST:PORT of the first host, which writes."""
    num_processes: int | None = None
    """Hosts, with --coordinator HOST:PORT."""
    process_id: int | None = None
    """This host, from 0, with --coordinator HOST:PORT."""

    BUCKETS: ClassVar[tuple[str, ...]] = ("source", "out")
    BOUNDS: ClassVar[Bounds] = {"num_processes": COUNT, "process_id": FROM_ZERO}

    @on_all_hosts
    def run(self) -> Mapping[str, Any]:
        """Exports; see `spacedrive_jax.interop.exporting`."""
        from spacedrive_jax.training.hosts import connect

        connect(self.coordinator, self.num_processes, self.process_id)
        if self.format != "safetensors" and (self.dtype != "float32" or self.average):
            raise ConfigError("--dtype and --average go with --to safetensors")
        if self.format == "spacedrive":
            outcome = self._for_published_code()
        elif self.format == "safetensors":
            outcome = self._whole()
        else:
            from spacedrive_jax.inference.open_model import open_vlm
            from spacedrive_jax.interop.exporting import export_hf, export_peft

            write = {"hf": export_hf, "peft": export_peft}[self.format]
            outcome = write(open_vlm(self.source, mesh_of(self.mesh)), self.out)
        left_out = outcome.get("left_out")
        print(f"wrote {self.out}" + (f", without {', '.join(left_out)}" if left_out else ""))
        return outcome

    def _whole(self) -> Mapping[str, Any]:
        from spacedrive_jax.inference.open_model import export_trained_folder

        metadata = export_trained_folder(
            self.source, self.out, dtype=self.dtype, average=self.average, mesh=mesh_of(self.mesh)
        )
        return {"out": str(self.out), **dataclasses.asdict(metadata)}

    def _for_published_code(self) -> Mapping[str, Any]:
        from spacedrive_jax.inference.open_model import open_trained_model
        from spacedrive_jax.interop.spacedrive import export_imported, export_trained
        from spacedrive_jax.interop.weights_folder import is_imported
        from spacedrive_jax.training.checkpoints import locate
        from spacedrive_jax.training.trained_folder import is_trained_folder, trained_metadata

        if is_imported(self.source):
            return export_imported(local(self.source), self.out)
        trained = is_trained_folder(self.source)
        step = trained_metadata(local(self.source)).step if trained else locate(self.source)[1]
        return export_trained(open_trained_model(self.source, mesh=mesh_of(self.mesh)).model, step, self.out)

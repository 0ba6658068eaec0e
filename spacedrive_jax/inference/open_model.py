"""Opens what `--checkpoint` names, a training run or a published checkpoint that was imported, as a model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from flax import nnx
from jax.sharding import Mesh

from spacedrive_jax.bounds import require_kind
from spacedrive_jax.config import Config, read_config, to_json
from spacedrive_jax.data.depth_cache import DepthCache
from spacedrive_jax.data.tokenizer import tokenizer_file
from spacedrive_jax.errors import CheckpointError, ConfigError
from spacedrive_jax.interop.exporting import (
    Exportable,
    base_licence,
    data_licence,
    model_card,
    scores_of,
    write_processor,
)
from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.interop.hf_config import PROCESSOR_FILES, read_special_ids
from spacedrive_jax.interop.importing import copy_tokenizer
from spacedrive_jax.interop.peft import base_of
from spacedrive_jax.interop.safetensors_folder import check_folder
from spacedrive_jax.interop.weights_folder import (
    ADAPTER_FOLDER,
    EXTRAS_FILE,
    METADATA_FILE,
    RUN_FILE,
    WeightsMetadata,
    fill_new_rows,
    imported_config,
    is_imported,
    load,
    trained_rules,
)
from spacedrive_jax.io import file_sha256, place
from spacedrive_jax.models.language_model import NewTokenParam
from spacedrive_jax.models.spacedrive import SpaceDrive
from spacedrive_jax.models.vision_language import VisionLanguageModel
from spacedrive_jax.training import checkpoints, run_folder
from spacedrive_jax.training.fingerprints import base_fingerprint, check_trained_on
from spacedrive_jax.training.sharding import mesh_here
from spacedrive_jax.training.state import abstract_state, frozen_state, init_train_state
from spacedrive_jax.training.step import make_train_step
from spacedrive_jax.training.trained_folder import (
    StoredType,
    TrainedMetadata,
    is_trained_folder,
    read_trained,
    trained_config,
    trained_metadata,
    write_trained_folder,
)
from spacedrive_jax.training.weights import is_run, on_disk, run_config

# Opens the vision-language model of whatever folder holds one.


def open_model(
    path: str | Path, *, average: bool = False, mesh: Mesh | None = None
) -> VisionLanguageModel | TrainedModel:
    """Opens whatever holds a model.

    Args:
        path: a transformers checkpoint or a weights folder of `import-weights --from hf|peft`; a training run
            (its newest checkpoint), `RUN/best`, `RUN/checkpoints/STEP`, or an imported SpaceDrive.
        average: of a run, take the moving average of the weights.
        mesh: devices of a run's model; by default its own mesh where it fits, else what there is.

    Returns:
        The bare vision-language model of the first two; of the others a `TrainedModel`: the SpaceDrive
        (`.model`) with the config of its run (`.config`).

    Raises:
        CheckpointError: the folder is none of these, or damaged.
    """
    path = on_disk(path)
    if is_run(path) or is_imported(path) or is_trained_folder(path):
        return open_trained_model(path, average=average, mesh=mesh)
    return open_vlm(path).model


def open_vlm(source: Path, mesh: Mesh | None = None) -> Exportable:
    """Loads a vision-language model in the types it is stored in.

    Args:
        source: a weights folder, a transformers checkpoint, a training run (its newest checkpoint) or
            `RUN/checkpoints/STEP`.
        mesh: where a run's model is put; None for `mesh_here`. Others go to the default device.

    Returns:
        The model.

    Raises:
        CheckpointError: the folder is none of these, or damaged.
    """
    source = on_disk(source)
    tokenizer = functools.partial(copy_tokenizer, source)
    if is_imported(source):
        return _open_imported(source)
    if (source / METADATA_FILE).is_file():
        return Exportable(load(source), _base_name(source), tokenizer)
    if is_run(source) or is_trained_folder(source):
        return _open_run(source, mesh)
    if (source / "config.json").is_file():
        return Exportable(from_hf(source), str(source), tokenizer)
    check_folder(source)
    raise CheckpointError(
        f"{source} is neither a weights folder (import-weights), nor a transformers checkpoint, nor a run"
    )


def _base_name(source: Path) -> str:
    """What PEFT is to load below adapters that come from a weights folder: their base, or the folder itself.

    The folder's base lies in it too, so it serves where the base has no name or is no longer there.
    """
    named = base_of(source / ADAPTER_FOLDER) if (source / ADAPTER_FOLDER).is_dir() else None
    named = named or WeightsMetadata.read(source).source
    return named if (place(named) / "config.json").is_file() else str(source)


def _open_imported(source: Path) -> Exportable:
    """A published SpaceDrive's vision-language model with the rows it trained for the new tokens."""
    metadata, config = WeightsMetadata.read(source), imported_config(source).model
    assert metadata.new_tokens is not None
    model = load(source, trainable_tokens=config.new_token_rows)
    state = {("vlm", *path): value for path, value in nnx.to_flat_state(nnx.state(model, NewTokenParam))}
    fill_new_rows(state, source, config, metadata.new_tokens)
    nnx.update(model, nnx.from_flat_state([(path[1:], value) for path, value in state.items()]))
    heads = {str(rule.target[0]) for rule in trained_rules(config, metadata.new_tokens)} - {"vlm"}
    tokenizer = functools.partial(copy_tokenizer, source)
    return Exportable(model, _base_name(source), tokenizer, tuple(sorted(heads)))


def _open_run(source: Path, mesh: Mesh | None) -> Exportable:
    """A trained run's vision-language model, with what its base's folder holds for transformers."""
    trained = open_trained_model(source, mesh=mesh)
    config, model = trained.config, trained.model
    modules = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model))} - {"vlm"}
    weights = _base_weights(config)
    is_folder = weights is not None and (place(weights) / METADATA_FILE).is_file()
    named = weights or f"random weights of {source}"
    base = _base_name(on_disk(named)) if is_folder else named
    beside = [on_disk(each) for each in (weights, config.data.tokenizer) if each is not None]
    if weights is not None and (place(weights) / "config.json").is_file() and not is_run(weights):
        model.vlm.special_ids = read_special_ids(on_disk(weights))

    def write_tokenizer(folder: Path) -> None:
        write_processor(
            folder, config.data.tokenizer, config.model.vlm, [each for each in beside if each.is_dir()]
        )

    return Exportable(
        model.vlm, base, write_tokenizer, tuple(sorted(modules)), run_card(source, config, "hf")
    )


def _base_weights(config: Config) -> str | None:
    """Where a run's frozen base came from, through the runs that it was started from."""
    weights = config.model.weights
    while weights is not None and is_run(weights):
        before = run_config(checkpoints.standing_in(weights))
        if not before.model.use_lora:
            return weights  # that run trained the base itself
        weights = before.model.weights
    return weights


def run_card(source: Path, config: Config, kind: Literal["hf", "safetensors"]) -> str:
    """The model card of a trained model.

    Args:
        source: a run folder, one of its checkpoints, or a trained folder.
        config: of the run.
        kind: how it will be loaded.
    """
    weights = _base_weights(config)
    base = None if weights is None else on_disk(weights)
    details = {"Config": f"`{config.name}`, {type(config.model.vlm).__name__}"}
    scores: list[Mapping[str, Any]] = []
    if is_trained_folder(source):
        known = dataclasses.asdict(trained_metadata(source))
    else:
        run_dir, step = checkpoints.locate(source)
        known = checkpoints.read_metadata(run_dir, step) | {"step": step}
        scores = scores_of(run_dir, known.get("trainable_fingerprint"))
    details["Steps"] = str(known.get("step"))
    details["Data"] = f"records with fingerprint `{known.get('records_fingerprint')}`"
    licence, noted = data_licence(config.data.records, known.get("records_fingerprint"))
    if licence:
        details["Data's licence"] = licence
    if noted:
        details["Data's source"] = noted
    return model_card(
        name=config.name,
        base=None if base is None else base.name,
        kind=kind,
        licence=base_licence(base),
        details=details,
        scores=scores,
        processor=base is not None and any((base / name).is_file() for name in PROCESSOR_FILES),
    )


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model's numbers on their devices; `nnx.merge` puts graph and states together."""

    config: Config
    """The run that made it."""
    mesh: Mesh
    graph: nnx.GraphDef = dataclasses.field(repr=False)
    trainable: nnx.State = dataclasses.field(repr=False)
    frozen: nnx.State = dataclasses.field(repr=False)

    @property
    def model(self) -> SpaceDrive:
        """Graph and states put together."""
        return nnx.merge(self.graph, self.trainable, self.frozen)


def check_trained(model: object, what: str) -> None:
    """Refuses anything that is no `TrainedModel` where one is asked for.

    Args:
        model: what was given.
        what: who asks.

    Raises:
        ConfigError: it is something else; the message says what.
    """
    require_kind(
        model,
        TrainedModel,
        f"{what} takes what open_model(FOLDER) gives of a trained SpaceDrive, which has its config too",
    )


def open_config(checkpoint: Path) -> Config:
    """The config of what `--checkpoint` names, without its numbers.

    Raises:
        CheckpointError: there is neither a finished checkpoint nor an imported one.
    """
    checkpoint = on_disk(checkpoint)
    if is_imported(checkpoint):
        if (checkpoint / "checkpoints").is_dir():
            raise CheckpointError(
                f"{checkpoint} holds two answers, an imported checkpoint ({RUN_FILE}) and those of a run: "
                "keep them in folders of their own"
            )
        return imported_config(checkpoint)
    if is_trained_folder(checkpoint):
        return trained_config(checkpoint)
    run_dir, step = checkpoints.locate(checkpoint)
    config = config_of_run(run_dir)
    run_folder.check_config(
        checkpoints.read_metadata(run_dir, step),
        config,
        run_dir / "checkpoints" / str(step),
        run_folder.accepted_changes(run_dir),
    )
    return config


def config_of_run(run_dir: Path) -> Config:
    """The config.json of a run, or of what was exported of it.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return read_config(run_dir / "config.json")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def name_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Which numbers `--checkpoint` stands for now, and their fingerprints.

    Raises:
        SpaceDriveError: see `open_config`.
    """
    checkpoint = on_disk(checkpoint)
    if is_imported(checkpoint):
        # What the numbers mean stands in the JSON beside them: the run, the adapter's scale.
        parts = [checkpoint / EXTRAS_FILE, checkpoint / RUN_FILE]
        parts += sorted(file for file in (checkpoint / ADAPTER_FOLDER).glob("*") if file.is_file())
        digest = hashlib.sha256()
        for file in parts:
            digest.update(bytes.fromhex(file_sha256(file)))
        return {
            "path": str(checkpoint.resolve()),
            "base_fingerprint": WeightsMetadata.read(checkpoint).fingerprint,
            "trainable_fingerprint": digest.hexdigest(),
        }
    if is_trained_folder(checkpoint):
        trained = trained_metadata(checkpoint)
        return {
            "path": str(checkpoint.resolve()),
            "config": to_json(config_of_run(checkpoint)),
            "base_fingerprint": trained.base_fingerprint,
            "trainable_fingerprint": trained.sha256,
        }
    run_dir, step = checkpoints.locate(checkpoint)
    metadata = checkpoints.read_metadata(run_dir, step)
    names = ("config", "base_fingerprint", "trainable_fingerprint")
    path = str(run_dir.resolve() / "checkpoints" / str(step))
    return {"path": path} | {name: metadata.get(name) for name in names}


def name_inputs(config: Config, depth: DepthCache | None) -> dict[str, Any]:
    """What answers depend on beside a checkpoint and the records: the tokenizer, and a network's depth.

    Args:
        config: of the checkpoint.
        depth: the sidecar that its prompts take depth from, if any.

    Raises:
        SpaceDriveError: the tokenizer cannot be read.
    """
    return {
        "tokenizer": file_sha256(tokenizer_file(config.data.tokenizer)),
        "depth": None if depth is None else depth.provenance["fingerprint"],
    }


def open_trained_model(checkpoint: Path, *, average: bool = False, mesh: Mesh | None = None) -> TrainedModel:
    """Loads a trained model.

    Args:
        checkpoint: a run folder (its newest checkpoint), `RUN/checkpoints/STEP`, or a weights folder that
            `import-weights --from spacedrive` wrote.
        average: take the moving average of the trainables (`train.ema_decay`) instead of the last ones.
        mesh: where to put it; None for the run's own where it fits the devices there are, else all of them
            along `fsdp` (`mesh_here`).

    Raises:
        CheckpointError: it is none of these, or damaged, holds no average, or its base is no longer the one
            it was trained on.
    """
    checkpoint = on_disk(checkpoint)
    config = open_config(checkpoint)
    mesh = mesh_here(config.mesh) if mesh is None else mesh
    graph, trainable, _ = abstract_state(config, mesh)
    if is_imported(checkpoint):
        if average:
            raise CheckpointError(
                f"{checkpoint} was imported and holds no moving average: leave --average out"
            )
        return TrainedModel(config, mesh, graph, *init_train_state(config, mesh))
    frozen = frozen_state(config, mesh)
    if is_trained_folder(checkpoint):
        if average:
            raise CheckpointError(
                f"{checkpoint} was exported and holds no moving average: leave --average out"
            )
        now = {"base_fingerprint": base_fingerprint(config, frozen, mesh)}
        check_trained_on(dataclasses.asdict(trained_metadata(checkpoint)), now)
        return TrainedModel(config, mesh, graph, read_trained(checkpoint, trainable), frozen)
    run_dir, step = checkpoints.locate(checkpoint)
    base = base_fingerprint(config, frozen, mesh)
    check_trained_on(checkpoints.read_metadata(run_dir, step), {"base_fingerprint": base})
    if average:
        optimizer = make_train_step(config, mesh).optimizer_state
        trainable = checkpoints.restore_average(run_dir, step, optimizer)
    else:
        trainable = checkpoints.restore_trainable(run_dir, step, trainable)
    return TrainedModel(config, mesh, graph, trainable, frozen)


def export_trained_folder(
    source: Path, out: Path, *, dtype: StoredType = "float32", average: bool = False, mesh: Mesh | None = None
) -> TrainedMetadata:
    """Writes a trained run as one folder of safetensors (see `trained_folder`).

    Args:
        source: a run folder, or `RUN/checkpoints/STEP`.
        out: folder to create.
        dtype: to store the numbers in.
        average: the moving average of the trainables instead of the last ones.
        mesh: where the model is put meanwhile.

    Raises:
        CheckpointError: it is no run, or damaged.
        SpaceDriveError: `out` exists, or cannot be written.
    """
    if is_imported(source):
        raise CheckpointError(f"{source} was imported and is a folder to hand on as it stands: copy it")
    if is_trained_folder(source):
        raise CheckpointError(f"{source} is such a folder already: copy it")
    run_dir, step = checkpoints.locate(source)
    trained = open_trained_model(source, average=average, mesh=mesh)
    metadata = checkpoints.read_metadata(run_dir, step) | {"step": step}
    card = run_card(source, trained.config, "safetensors")
    return write_trained_folder(out, trained.config, trained.trainable, metadata, card, dtype)

"""Numbers that make no sense are refused by name, before anything is loaded."""

import dataclasses
import functools
import itertools
import math
import types
import typing

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import data_prep.cli
import spacedrive_jax.cli.main
from spacedrive_jax import SpaceDrive, batch_spec, console, fake_batch, with_weights
from spacedrive_jax.config import Config, MeshConfig, TrainConfig, load_config, to_json
from spacedrive_jax.data.depth_sources import DepthConfig, DepthDisturbance
from spacedrive_jax.data.images import CameraFault
from spacedrive_jax.data.lidar import FusionConfig
from spacedrive_jax.data.transforms import DataConfig
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.inference.depth_network import DepthNetworkConfig
from spacedrive_jax.models.config import (
    ComputeConfig,
    LanguageModelConfig,
    LoraConfig,
    VisionConfig,
    VLConfig,
)
from spacedrive_jax.models.coordinate_decoder import CoordinateDecoderConfig, GridConfig
from spacedrive_jax.models.coordinate_encoder import CoordinateEncoderConfig
from spacedrive_jax.models.depth.backbone import Dinov2Config
from spacedrive_jax.models.depth.depth_anything import DepthAnythingConfig
from spacedrive_jax.models.depth.unidepth import UniDepthConfig
from spacedrive_jax.models.families.llava import ClipVisionConfig, LlavaConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVisionConfig, QwenVLConfig
from spacedrive_jax.models.spacedrive_config import ModelConfig
from tests.conftest import ROOT

CONFIGS = [
    CameraFault,
    ClipVisionConfig,
    ComputeConfig,
    Config,
    CoordinateDecoderConfig,
    CoordinateEncoderConfig,
    DataConfig,
    LanguageModelConfig,
    DepthAnythingConfig,
    DepthConfig,
    DepthDisturbance,
    DepthNetworkConfig,
    Dinov2Config,
    FusionConfig,
    GridConfig,
    LlavaConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    QwenVLConfig,
    QwenVisionConfig,
    TrainConfig,
    UniDepthConfig,
]
COMMANDS = {**spacedrive_jax.cli.main.COMMANDS, **data_prep.cli.COMMANDS}


def kinds(hint):
    """All types in an annotation."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return set()
    return {hint} if not inner else set().union(*(kinds(each) for each in inner))


def numeric_fields(owner):
    hints = typing.get_type_hints(owner)
    names = [field.name for field in dataclasses.fields(owner)]
    return {name for name in names if kinds(hints[name]) & {int, float}}


@pytest.mark.parametrize("owner", [*CONFIGS, *COMMANDS.values()], ids=lambda owner: owner.__name__)
def test_every_number_has_a_bound(owner):
    assert numeric_fields(owner) == set(getattr(owner, "BOUNDS", {}))


def test_every_part_of_a_config_is_here():
    parts, seen = [Config], set()
    while parts:
        part = parts.pop()
        seen.add(part)
        hints = typing.get_type_hints(part)
        for field in dataclasses.fields(part):
            parts += [
                kind
                for kind in kinds(hints[field.name])
                if isinstance(kind, type) and not isinstance(kind, types.GenericAlias)
                if dataclasses.is_dataclass(kind) and kind not in seen
            ]
    bases = {VisionConfig, VLConfig}  # every family derives its own
    without_numbers = {part for part in seen if not numeric_fields(part)}
    assert seen - without_numbers - bases <= set(CONFIGS)


def senseless(bound):
    """Values that the bound does not hold, not whole numbers and infinities among them."""
    tried = (-math.inf, -1e9, -2, -1, -0.5, 0, 1, 2, 1e12, math.inf, math.nan)
    return [value for value in tried if not bound.holds(value)]


@pytest.mark.parametrize(
    "owner", [each for each in CONFIGS if numeric_fields(each)], ids=lambda o: o.__name__
)
def test_configs_refuse_by_the_dotted_name(owner):
    needed = {"weights": "w"} if owner is DepthNetworkConfig else {}
    for field, bound in owner.BOUNDS.items():
        wrong = senseless(bound)
        assert {math.inf, -math.inf} <= set(wrong)
        for value in wrong:
            pair = isinstance(getattr(owner(**needed), field), tuple)
            with pytest.raises(ConfigError, match=rf"(^|\.){field} "):
                owner(**needed, **{field: (value, value) if pair else value})


@pytest.mark.parametrize(
    "owner", [each for each in CONFIGS if numeric_fields(each)], ids=lambda o: o.__name__
)
def test_a_count_that_is_no_whole_number_is_refused(owner):
    hints = typing.get_type_hints(owner)
    needed = {"weights": "w"} if owner is DepthNetworkConfig else {}
    for field, bound in owner.BOUNDS.items():
        value = next((each for each in (1.5, 2.5, 0.5, 32.5) if bound.holds(each)), None)
        if value is None or kinds(hints[field]) & {float}:
            continue
        pair = isinstance(getattr(owner(**needed), field), tuple)
        with pytest.raises(ConfigError, match=rf"(^|\.){field} .*whole number"):
            owner(**needed, **{field: (value, value) if pair else value})


@pytest.mark.parametrize(
    "flags",
    [
        "--train.log-every 0",
        "--train.checkpoint-every 0",
        "--train.batch-size 0",
        "--train.max-to-keep 0",
        "--train.steps -3",
        "--train.learning-rate nan",
        "--train.clip-norm 0",
        "--train.beta1 1",
        "--train.seed -1",
        "--mesh.data 0",
        "--data.sequence-length 0",
        "--data.image-size 0 640",
        "--data.depth.far 0",
        "--model.encoder.base 0",
        "--model.decoder.grid.cells 1",
        "--model.lora.rank 0",
        "--model.path-points -1",
    ],
)
def test_train_refuses_by_the_flag(flags, capsys):
    flag, *values = flags.split()
    assert spacedrive_jax.cli.main.main(["train", "demo", flag, *values]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {flag.removeprefix('--').replace('-', '_')} "), said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("idle", "needs"),
    [
        ("--model.lora.rank 2", "--model.use-lora True"),
        ("--model.decoder.latent-size 3", "--model.decoder.kind vae"),
        ("--model.decoder.grid.cells 16", "--model.decoder.kind grid_l2"),
        ("--model.encoder.fone-width 30", "--model.encoder.kind fone"),
        ("--data.depth.disturb.cameras CAM_FRONT", "--data.depth.disturb.blur 1"),
        ("--train.path-weight 2", "--model.path-points 1"),
        ("--train.best-by loss", "--train.validate-every 2"),
    ],
)
def test_train_refuses_flags_that_nothing_reads(idle, needs, capsys, caplog, tmp_path):
    config, folder = str(ROOT / "tests" / "tiny_config.py"), str(tmp_path / "run")
    run = ["train", config, "--data.records", "none", "--run-dir", folder]
    field = idle.split()[0].removeprefix("--").replace("-", "_")
    said = f"{field} does nothing without "
    assert spacedrive_jax.cli.main.main([*run, *idle.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}"), error
    assert error.count("\n") == 1
    assert spacedrive_jax.cli.main.main([*run, *idle.split(), *needs.split()]) == 1
    assert "does nothing" not in capsys.readouterr().err
    # One who began a run before this was refused can go on with it.
    caplog.set_level("WARNING")
    assert spacedrive_jax.cli.main.main([*run, *idle.split(), "--resume"]) == 1
    assert said in caplog.text
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: none is not a finished records folder")


@pytest.mark.parametrize("flag", ["base 100", "alpha 0.5", "frequency-scaling 2"])
def test_waves_of_past_positions_count_beside_an_mlp(flag, capsys, tmp_path):
    config = str(ROOT / "tests" / "tiny_config.py")
    run = ["train", config, "--data.records", "none", "--run-dir", str(tmp_path / "run")]
    name, value = flag.split()
    flags = ["--model.encoder.kind", "mlp", f"--model.encoder.{name}", value]
    assert spacedrive_jax.cli.main.main([*run, *flags]) == 1
    assert "does nothing" not in capsys.readouterr().err


def needed_by(command):
    fields = dataclasses.fields(command)
    missing = dataclasses.MISSING
    return {each.name: "x" for each in fields if each.default is missing and each.default_factory is missing}


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.BOUNDS])
def test_commands_refuse_by_the_flag(name, capsys):
    command = COMMANDS[name]
    for field, bound in command.BOUNDS.items():
        for value in senseless(bound):
            wrong = (value, value) if field == "profile" else value
            given = needed_by(command) | {field: wrong}
            assert console.parse_and_run(functools.partial(command, **given)) == 1
            said = capsys.readouterr().err
            assert said.startswith(f"error: --{field.replace('_', '-')} {wrong!r} must be "), said


def test_a_refused_flag_is_one_line(capsys):
    command = ["predict", "--checkpoint", "run", "--records", "records", "--batch-size", "0"]
    assert spacedrive_jax.cli.main.main(command) == 1
    assert capsys.readouterr().err == "error: --batch-size 0 must be 1 or more\n"
    assert data_prep.cli.main(["synthesize", "--out", "world", "--scenes", "0"]) == 1
    assert capsys.readouterr().err == "error: --scenes 0 must be 1 or more and at most 9000\n"


@pytest.mark.parametrize(
    ("coordinator", "words"),
    [
        ("node0", "no HOST:PORT"),
        ("node0:", "no HOST:PORT"),
        (":1234", "no HOST:PORT"),
        ("n:70000", "HOST:PORT"),
    ],
)
def test_a_coordinator_needs_its_port(coordinator, words, capsys):
    flags = ["--coordinator", coordinator, "--num-processes", "2", "--process-id", "0"]
    assert spacedrive_jax.cli.main.main(["train", "demo", *flags]) == 1
    assert capsys.readouterr().err.startswith(f"error: --coordinator {coordinator} is no HOST:PORT")


def test_a_profile_needs_steps(capsys):
    assert spacedrive_jax.cli.main.main(["train", "demo", "--profile", "3", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: --profile 3 0: ")


@pytest.mark.parametrize("value", [1e38, -1e38, 1e308, 10**400])
def test_numbers_larger_than_float32_are_refused(value):
    with pytest.raises(ConfigError, match=r"position_weight .*larger than what numbers are computed with"):
        TrainConfig(position_weight=value)


def test_types_that_cannot_be_computed_in_and_trackers_named_twice_are_refused():
    # float64 jax takes for float32 without a word, unless all of it computes with 64 bits.
    for name, value in itertools.product(("dtype", "param_dtype"), ("int8", "float64")):
        with pytest.raises(ConfigError, match=rf"model\.compute\.{name} '{value}' must be one of float32, "):
            ComputeConfig(**{name: value})
    with pytest.raises(ConfigError, match=r"train\.trackers jsonl jsonl: names one twice"):
        TrainConfig(trackers=("jsonl", "jsonl"))


@pytest.mark.usefixtures("unchecked")
def test_configs_take_what_notebooks_hand_them_and_hold_fields_to_their_types(tmp_path):
    train = TrainConfig(steps=np.int64(3), learning_rate=jnp.float32(0.5))
    assert (type(train.steps), type(train.learning_rate)) == (int, float)
    data = DataConfig(records=tmp_path, image_size=[np.int32(28), 56])
    assert (data.records, data.image_size) == (str(tmp_path), (28, 56))
    config = Config(run_dir=tmp_path / "run", train=train, data=data)
    (tmp_path / "config.json").write_text(to_json(config))
    assert load_config(tmp_path / "config.json") == config
    for made, said in (
        (lambda: TrainConfig(steps=None), "train.steps 'None' must be of type int"),
        (lambda: DataConfig(command="routes"), "data.command 'routes' must be one of"),
        (lambda: DataConfig(image_size=(1, 2, 3)), "data.image_size .* must be of type tuple"),
        (lambda: Config(train={"steps": 3}), "train .* must be of type TrainConfig"),
        (lambda: load_config(None), "expected a path"),
        (lambda: batch_spec("demo"), "batch_spec takes a Config, as load_config"),
        (lambda: batch_spec(config, 0), "train.batch_size 0"),
        (lambda: fake_batch(data), "fake_batch takes a Config"),
        (lambda: with_weights("demo"), "with_weights takes a Config"),
        (lambda: SpaceDrive(config, indicator_id=1, rngs=nnx.Rngs(0)), "takes a ModelConfig"),
        (lambda: SpaceDrive(config.model, indicator_id=-1, rngs=nnx.Rngs(0)), "indicator_id -1"),
    ):
        with pytest.raises(ConfigError, match=said):
            made()

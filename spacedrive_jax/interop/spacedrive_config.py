"""The published configs, read as data, and their constructor arguments as this project's config."""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from spacedrive_jax.config import TrainConfig
from spacedrive_jax.constants import NUM_PAST
from spacedrive_jax.data.conversation import Tasks
from spacedrive_jax.data.depth_sources import DepthSource
from spacedrive_jax.data.transforms import DataConfig
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.interop.hf_config import published_of
from spacedrive_jax.io import MEBIBYTE, read_text
from spacedrive_jax.json_files import convert, parse_json
from spacedrive_jax.models.config import ComputeConfig, LoraConfig, VLConfig
from spacedrive_jax.models.coordinate_decoder import CoordinateDecoderConfig, DecoderKind
from spacedrive_jax.models.coordinate_encoder import CoordinateEncoderConfig, EncoderKind
from spacedrive_jax.models.spacedrive_config import EgoStatusInput, ModelConfig

# The published configs (mmcv: Python files of assignments), read as data: nothing in them is run.


LOADER = "LoadAnnoatationVQA"
"""The loader that makes the conversations, spelled as published."""
OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


@dataclasses.dataclass(frozen=True)
class PublishedConfig:
    """What a published config says of the model and its conversations."""

    model: Mapping[str, Any]
    """The model's constructor arguments."""
    loader: Mapping[str, Any]
    """Those of the training loader; empty where the config has none."""


def read_published_config(path: Path) -> PublishedConfig:
    """Reads a published config.

    Args:
        path: an mmcv config (.py), or JSON: the constructor's arguments, alone or under `model`.

    Raises:
        ConfigError: the file cannot be read or does not say how the model is built.
    """
    try:
        text = read_text(path, most=MEBIBYTE)
    except DataError as error:
        raise ConfigError(f"cannot read the published config {path}: {error}") from error
    if path.suffix == ".py":
        return parse_published_config(text, str(path))
    content = parse_json(text, path)
    arguments = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(arguments, dict):
        raise ConfigError(
            f"{path} must hold an object of constructor arguments, not {type(arguments).__name__}"
        )
    return _checked(PublishedConfig(arguments, _loader(content)), str(path))


def _checked(config: PublishedConfig, origin: str) -> PublishedConfig:
    """Refuses arguments of another type than the published constructor takes."""
    try:
        convert(config.model, _Arguments, f"{origin}, model")
    except DataError as error:
        raise ConfigError(str(error)) from error
    return config


def parse_published_config(text: str, origin: str) -> PublishedConfig:
    """Reads the text of an mmcv config: literals, names assigned before, `dict(...)` and plain arithmetic.

    Other assignments are passed over, unless `model` needs them.

    Args:
        text: the config, as a file or as mmcv writes it into a checkpoint's `meta`.
        origin: what to call it in messages.

    Raises:
        ConfigError: it is not Python, or does not assign a `model` that can be read without running it.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{origin} is not a Python config: {error}") from error
    names: dict[str, Any] = {}
    unread: dict[str, _NotLiteralError] = {}
    budget = 50 * MOST_PARTS
    for statement in tree.body:
        if budget < 0:
            raise ConfigError(f"{origin} comes to more than a config of a model has")
        if not isinstance(statement, ast.Assign):
            continue
        for target in statement.targets:
            if isinstance(target, ast.Name):
                try:
                    value = _value(statement.value, names)
                    budget -= _count(value)
                    names[target.id] = value
                except (_NotLiteralError, RecursionError, OverflowError, TypeError) as error:
                    names.pop(target.id, None)  # what it was before is not what it is now
                    said = (
                        error if isinstance(error, _NotLiteralError) else f"line {statement.lineno}: {error}"
                    )
                    unread[target.id] = _NotLiteralError(str(said))
    if not isinstance(names.get("model"), dict):
        reason = f" ({unread['model']})" if "model" in unread else ", also where a `_base_` file does"
        raise ConfigError(f"{origin} does not assign `model = dict(...)` in values that can be read{reason}")
    return _checked(PublishedConfig(names["model"], _loader(names)), origin)


def _loader(names: Mapping[str, Any]) -> Mapping[str, Any]:
    steps = names.get("train_pipeline")
    for step in steps if isinstance(steps, list) else ():
        if isinstance(step, dict) and step.get("type") == LOADER:
            return step
    return {}


class _NotLiteralError(ValueError):
    """An expression that would have to be run."""


MOST_PARTS = 100_000
"""Values within a value, names that stand for lists counted out: a few lines can double one for ever."""
MOST_NUMBER = 1e15


def _count(value: Any) -> int:
    """How many values a value holds.

    Raises:
        _NotLiteralError: more than a config of a model has.
    """
    waiting, count = [value], 0
    while waiting:
        each = waiting.pop()
        count += 1
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
        if count + len(waiting) > MOST_PARTS:
            raise _NotLiteralError(f"it holds more than {MOST_PARTS:,} values")
    return count


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression of literals."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        values = [_value(each, names) for each in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_value(key, names) for key in node.keys if key is not None]
        return dict(zip(keys, (_value(each, names) for each in node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _value(node.operand, names)
        if isinstance(operand, int | float):
            return -operand
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left, names), _value(node.right, names)
        both = (left, right)
        numbers = all(isinstance(each, int | float) for each in both)
        joined = isinstance(node.op, ast.Add) and isinstance(left, str | list) and type(left) is type(right)
        if (joined and len(left) + len(right) > MOST_PARTS) or (
            numbers and max(map(abs, both)) > MOST_NUMBER
        ):
            raise _NotLiteralError(f"line {node.lineno}: larger than anything in a config of a model")
        if (numbers and not (isinstance(node.op, ast.Div | ast.FloorDiv) and right == 0)) or joined:
            return OPERATORS[type(node.op)](left, right)
    is_dict = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict"
    if is_dict and isinstance(node, ast.Call) and not node.args and all(each.arg for each in node.keywords):
        return {str(each.arg): _value(each.value, names) for each in node.keywords}
    raise _NotLiteralError(f"line {node.lineno}: {ast.unparse(node)[:60]!r}")


ENCODERS: dict[str, EncoderKind] = {"transformer": "sincos", "nerf": "nerf", "fone": "fone"}
DECODERS: dict[str, DecoderKind] = {
    "l2_coords_mlp_2layer": "mlp",
    "l2_coords_mlp": "linear",
    "cosine": "grid_cosine",
    "l2": "grid_l2",
    "l2_coords_full_grid": "grid_full",
}
EGO_STATUS: dict[str, EgoStatusInput] = {
    "": "none",
    "feature": "feature",
    "PE": "positions",
    "feature+PE": "both",
}
NEW_TOKEN_SUFFIX = "with-new-special-tokens"
"""A checkpoint name that ends so makes the published Qwen code add rows for the new tokens."""
DEPTH: dict[str, DepthSource] = {"unidepth": "unidepth", "depth_anything": "depth_anything"}
DEFAULTS: dict[str, Any] = {
    "vis_3d_pos": False,
    "pe_decode_method": "cosine",
    "pe_scaling": 1.0,
    "learnable_pe_scaling": False,
    "loss_pos_lambda": 0.5,
    "planning_only": False,
    "depth_model_type": "depth_anything",
}
"""What the published constructor takes where an argument is absent (and this project's configs do not)."""
_FLAGS = (
    *("vis_3d_pos", "learnable_pe_scaling", "planning_only", "input_pe_mlp", "use_rope", "io_3d_pos"),
    *("use_vae_to_replace_mlp", "with_cur", "single_token_output", "enable_pe_input", "use_lora", "frozen"),
    *("include_semantic_posemb", "supervise_semantic_posemb", "single_coords_only"),
)
_NUMBERS = ("pe_scaling", "pe_freq_coeff", "pe_freq_scaling", "loss_pos_lambda", "huber_delta")
READ = {
    **dict.fromkeys(_FLAGS, bool | int | None),
    **dict.fromkeys(_NUMBERS, Annotated[float, Meta(ge=-MOST_NUMBER, le=MOST_NUMBER)]),
    **dict.fromkeys(("fone_dim", "ego_status_len", "llm_lora_rank"), Annotated[int, Meta(ge=0, le=1 << 31)]),
    **dict.fromkeys(("pe_decode_method", "depth_model_type", "pe_type", "loss_pos_type"), str),
    **dict.fromkeys(("ego_status", "lm_head"), str | None),
}
"""The arguments that mean something here, and of what type they are."""
_Arguments = msgspec.defstruct("_Arguments", [(name, kind, None) for name, kind in READ.items()])
WITHOUT_EFFECT = {
    *("type", "save_path", "tokenizer", "processor", "train_cfg", "test_cfg", "init_cfg", "pretrained"),
    *("stride", "precomputed_depth_root"),
}
"""Paths, and what follows from the vision-language model."""
DEFAULT_BASE = {"transformer": 10000.0, "nerf": 10.0, "fone": 10.0}
"""Ratio of the frequencies where the arguments name none."""


def encoder_config(arguments: Mapping[str, Any]) -> CoordinateEncoderConfig:
    """The coordinate encoder of `pe_*` arguments; absent ones take the published class's defaults.

    Raises:
        ConfigError: an encoding that this project does not know.
    """
    kind = arguments.get("pe_type", "transformer")
    if kind not in ENCODERS:
        raise ConfigError(f"pe_type {kind!r} is none of {', '.join(ENCODERS)}")
    learned = bool(arguments.get("input_pe_mlp", False))
    default = CoordinateEncoderConfig()
    return CoordinateEncoderConfig(
        kind="mlp" if learned else ENCODERS[kind],
        base=float(arguments.get("pe_freq_coeff", DEFAULT_BASE[kind])),
        frequency_scaling=float(arguments.get("pe_freq_scaling", 1.0)),
        fone_width=int(arguments.get("fone_dim", default.fone_width)),
        alpha=float(arguments.get("pe_scaling", default.alpha)),
        learnable_alpha=bool(arguments.get("learnable_pe_scaling", True)),
    )


def check_arguments(arguments: Mapping[str, Any], lora: LoraConfig) -> None:
    """Refuses arguments that this project does not know, or that the published code cannot run.

    Args:
        arguments: of the published constructor, defaults filled in.
        lora: the adapters there are.

    Raises:
        ConfigError: naming all of them.
    """
    method, ego = arguments["pe_decode_method"], arguments.get("ego_status") or ""
    learned, vae = arguments.get("input_pe_mlp"), arguments.get("use_vae_to_replace_mlp")
    whole = arguments.get("single_token_output")
    two_layers = method == "l2_coords_mlp_2layer"
    problems = [
        f"{name} is no argument of the published model that this version knows"
        for name in sorted(set(arguments) - READ.keys() - WITHOUT_EFFECT)
    ]
    if method not in DECODERS:
        problems.append(
            f"pe_decode_method {method!r} is none of {', '.join(DECODERS)} (the published code cannot run it)"
        )
    if ego not in EGO_STATUS:
        problems.append(f"ego_status {ego!r} is none of {', '.join(map(repr, EGO_STATUS))}")
    if int(arguments.get("ego_status_len", NUM_PAST)) != NUM_PAST:
        problems.append(f"ego_status_len {arguments['ego_status_len']}: records hold {NUM_PAST} past frames")
    if int(arguments.get("llm_lora_rank", lora.rank)) != lora.rank:
        problems.append(
            f"llm_lora_rank {arguments['llm_lora_rank']}, but the adapters have rank {lora.rank} (model.lora)"
        )
    if learned and not two_layers:
        problems.append(f"input_pe_mlp has two layers only with l2_coords_mlp_2layer, not with {method}")
    if (vae or whole) and not two_layers:
        switch = "use_vae_to_replace_mlp" if vae else "single_token_output"
        problems.append(f"{switch} acts only with pe_decode_method l2_coords_mlp_2layer, not with {method}")
    if vae and whole:
        problems.append("use_vae_to_replace_mlp does not act beside single_token_output")
    if arguments["depth_model_type"] not in DEPTH:
        problems.append(f"depth_model_type {arguments['depth_model_type']!r} is none of {', '.join(DEPTH)}")
    if arguments.get("frozen") or not arguments.get("use_lora", True):
        problems.append("frozen True or use_lora False: there are no adapters to read (use model.use_lora)")
    if problems:
        raise ConfigError(f"published arguments: {'; '.join(problems)}")


def model_config(
    arguments: Mapping[str, Any], vlm: VLConfig, lora: LoraConfig, compute: ComputeConfig
) -> ModelConfig:
    """The model of the published constructor's arguments; absent ones take its defaults.

    What LLaVA's published class ignores (`use_rope`, the semantic embedding) is ignored here too. `io_3d_pos`
    changes nothing: without it the published code cannot train, and still answers an indicator as with it.

    Raises:
        ConfigError: an argument or a combination that this project does not know, or that the published code
            itself cannot run.
    """
    arguments = DEFAULTS | dict(arguments)
    check_arguments(arguments, lora)
    published = published_of(vlm)
    semantic = bool(arguments.get("include_semantic_posemb", False))
    semantic_ignored = "include_semantic_posemb" in published.ignores
    position_input = bool(arguments.get("enable_pe_input", False))
    rotary = bool(arguments.get("use_rope", False)) and "use_rope" not in published.ignores
    visual: Literal["add", "rotate"] = "rotate" if rotary else "add"
    return ModelConfig(
        vlm=vlm,
        lora=lora,
        new_token_rows=published.trains_table_rows
        or NEW_TOKEN_SUFFIX in str(arguments.get("lm_head", NEW_TOKEN_SUFFIX)),
        encoder=encoder_config(arguments),
        decoder=CoordinateDecoderConfig(
            kind="vae"
            if arguments.get("use_vae_to_replace_mlp")
            else DECODERS[arguments["pe_decode_method"]],
            whole_trajectory=bool(arguments.get("single_token_output", False)),
            with_current=bool(arguments.get("with_cur", False)),
        ),
        visual_positions=visual if arguments["vis_3d_pos"] else "none",
        ego_status=EGO_STATUS[arguments.get("ego_status") or ""],
        # LLaVA feeds the semantic embedding plus zeros, which is no position input.
        position_input=position_input and not (semantic and semantic_ignored),
        position_input_training="zeros",
        semantic_position=semantic and not semantic_ignored,
        compute=compute,
    )


def data_config(arguments: Mapping[str, Any], loader: Mapping[str, Any], default: DataConfig) -> DataConfig:
    """The published data pipeline: BGR images, its depth network, its command sentence and questions.

    Args:
        arguments: of the model's constructor.
        loader: of the training loader (`LoadAnnoatationVQA`); where it is empty, command and questions are
            the default's.
        default: everything else.
    """
    arguments = DEFAULTS | dict(arguments)
    talk = dataclasses.replace(
        default.conversation, supervise_position_tokens=bool(arguments.get("supervise_semantic_posemb"))
    )
    command = default.command
    if loader:
        tasks: Tasks = "planning" if loader.get("planning_only") else "planning_and_questions"
        talk = dataclasses.replace(
            talk,
            tasks="counterfactual" if loader.get("counter_only") else tasks,
            pseudo_coordinates=bool(loader.get("pseudo_coords")),
            command_in_answer=bool(loader.get("load_high_level_command")),
        )
        command = "released" if loader.get("load_ego_command_in_question") else "none"
    return dataclasses.replace(
        default,
        channel_order="bgr",
        command=command,
        depth=dataclasses.replace(default.depth, sources=(DEPTH[arguments["depth_model_type"]],)),
        conversation=talk,
    )


def train_config(arguments: Mapping[str, Any]) -> TrainConfig:
    """The losses of the published constructor's arguments; everything else keeps its default."""
    arguments = DEFAULTS | dict(arguments)
    method, kind = arguments["pe_decode_method"], arguments.get("loss_pos_type", "huber")
    in_embedding = {"cosine": "cosine", "l2": "embedding_l2"}
    supervision: Literal["planning", "first", "all"]
    supervision = "planning" if arguments["planning_only"] else "all"
    if arguments.get("single_coords_only"):
        supervision = "first"
    return dataclasses.replace(
        TrainConfig(),
        position_loss=in_embedding.get(method, kind),
        huber_delta=float(arguments.get("huber_delta", 1.0)),
        position_weight=float(arguments["loss_pos_lambda"]),
        supervision=supervision,
    )

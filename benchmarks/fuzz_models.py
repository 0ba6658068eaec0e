"""What runs and their makers leave, to be mutated: sidecars, checkpoints, weights, configs, results."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from benchmarks.fuzz_inputs import (
    BYTES,
    JSON,
    Change,
    Target,
    anything,
    cut,
    edit_json,
    equal,
    finite,
    flip,
    insert,
    overwrite,
)
from data_prep.bench2drive.annotations import read_calibration, read_frame
from spacedrive_jax.config import load_config, to_json
from spacedrive_jax.data.depth_cache import DepthCache, write_chunk, write_provenance
from spacedrive_jax.data.tokenizer import DEMO_TOKENIZER, load_tokenizer
from spacedrive_jax.driving.client import PolicyError, pack, unpack
from spacedrive_jax.driving.drive import finish
from spacedrive_jax.driving.pdm import PdmScore
from spacedrive_jax.driving.protocol import act_message, partial_record
from spacedrive_jax.driving.scenarios import DriveSpec, drive_set
from spacedrive_jax.errors import DataError
from spacedrive_jax.evaluation.bench2drive import (
    ability_rates,
    comfort,
    read_junctions,
    read_motion,
    read_results,
    read_route_set,
    score_routes,
)
from spacedrive_jax.evaluation.counterfactual import count_risks, read_items
from spacedrive_jax.inference.depth_network import DepthNetworkConfig
from spacedrive_jax.inference.open_model import config_of_run
from spacedrive_jax.interop.hf_config import read_hf_config
from spacedrive_jax.interop.peft import read_peft_config
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder
from spacedrive_jax.interop.spacedrive_config import model_config, read_published_config, train_config
from spacedrive_jax.interop.unidepth import read_config
from spacedrive_jax.interop.weights_folder import WeightsMetadata
from spacedrive_jax.io import read_bytes
from spacedrive_jax.json_files import write_json
from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.families.qwen2_5_vl import QwenVLConfig
from spacedrive_jax.reporting.drives import write_page
from spacedrive_jax.reporting.run_files import read_run
from spacedrive_jax.training import checkpoints
from tests.conftest import ROOT
from tests.record_factory import make_record

MESSAGE: tuple[Change, ...] = (flip, flip, cut, overwrite, insert)
"""What may happen to bytes on their way; there is no file to be replaced."""
GOLDEN = ROOT / "tests" / "golden"
TEXT = "You are driving in boston. (+4.10, 0.0) <|im_end|>"


def plain(value: Any) -> Any:
    """Arrays, dataclasses and configs as values that compare."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), msgspec.to_builtins(value, enc_hook=_array))


def _array(value: Any) -> Any:
    return np.asarray(value).tolist()


# Depth sidecars


def sidecar(folder: Path) -> None:
    rng = np.random.default_rng(3)
    rows = {
        "token": ["a", "b", "c"],
        "patch_depth": list(rng.uniform(1, 60, (3, 6, 2, 3)).astype(np.float32)),
        "alignment": list(rng.uniform(0, 2, (3, 6, 3))),
        "full": [[rng.bytes(20 + camera) for camera in range(6)] for _ in range(3)],
    }
    facts = {"kind": "unidepth", "fingerprint": "f", "records_fingerprint": "r", "pooling": "min"}
    write_chunk(folder / "chunk-00000.safetensors", rows, facts)
    names = {"chunks": ["chunk-00000.safetensors"], "grid": [2, 3], "full": True, "aligned": 0}
    write_provenance(folder, facts | names)


def sidecar_values(folder: Path) -> Any:
    cache = DepthCache(folder, "r")
    return [
        (each.kind, each.pooling, each.patch_depth.tolist(), each.alignments, each.full)
        for each in map(cache.read, "abc")
    ]


# Checkpoints of a run


def _state() -> tuple[nnx.State, dict[str, jax.Array]]:
    values = jnp.arange(12.0, dtype=jnp.float32).reshape(3, 4)
    trainable = nnx.from_flat_state(
        [(("head", "kernel"), nnx.Param(values)), (("scale",), nnx.Param(values[0]))]
    )
    return trainable, {"mean": values + 1, "count": jnp.int32(7)}


def checkpoint(folder: Path) -> None:
    manager = checkpoints.open_manager(folder / "run", keep=2)
    for step in (3, 7):
        trainable, optimizer = _state()
        checkpoints.save(manager, step, trainable, optimizer, {"samples": step}, {"config": "{}"})
    with checkpoints.closing(manager):
        pass


def checkpoint_values(folder: Path) -> Any:
    run = folder / "run"
    trainable, optimizer = _state()
    if checkpoints.steps_of(run) != [3, 7]:  # a step that lost its folder's name is no checkpoint
        return None
    state, numbers, position, metadata = checkpoints.restore(run, 7, trainable, optimizer)
    return plain([nnx.to_pure_dict(state), numbers, position, metadata])


# Weights


def sharded(folder: Path) -> None:
    for file in (GOLDEN / "qwen_plus_train").glob("model*"):
        shutil.copyfile(file, folder / file.name)


def adapter(folder: Path) -> None:
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): np.ones((4, 8), np.float32), name.format("B"): np.ones((8, 4), np.float32)},
        folder / "adapter_model.safetensors",
    )
    values = {
        **dict(peft_type="LORA", task_type=None, r=4, lora_alpha=16, lora_dropout=0.0, bias="none"),
        **dict(target_modules=["q_proj"], init_lora_weights=True, use_rslora=False, use_dora=False),
        **dict(modules_to_save=None, rank_pattern={}, alpha_pattern={}, base_model_name_or_path="base"),
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))


def golden_file(case: str, name: str) -> Any:
    def make(folder: Path) -> None:
        shutil.copyfile(GOLDEN / case / name, folder / name)

    return make


def tensors_of(folder: Path) -> Any:
    opened = SafetensorsFolder(folder)
    opened.check_flavour()
    return {name: opened.read(name) for name in opened.shapes()}


def tokenizer(folder: Path) -> None:
    shutil.copyfile(DEMO_TOKENIZER, folder / "tokenizer.json")


def encoded(folder: Path) -> Any:
    loaded = load_tokenizer(folder)
    ids = loaded.encode(TEXT)
    assert all(0 <= number <= loaded.highest_id for number in ids)
    return loaded.decode(ids)


def weights_json(folder: Path) -> None:
    WeightsMetadata("qwen2_5_vl", "base", 3, 40, ("float32",), "f" * 64, 500).write(folder)


def published(folder: Path) -> None:
    arguments = json.loads((GOLDEN / "spacedrive_generate/config.json").read_text())["spacedrive_args"]
    (folder / "arguments.json").write_text(json.dumps(arguments))


def published_meaning(file: Path) -> Any:
    arguments = read_published_config(file).model
    model = model_config(arguments, QwenVLConfig.qwen2_5_vl_3b(), LoraConfig(rank=4), ComputeConfig())
    return plain([model, train_config(arguments)])


def network_json(folder: Path) -> None:
    write_json(folder / "net.json", {"weights": "w", "image_size": [56, 56], "grid": [2, 2]})


# Runs and results


def run_config(folder: Path) -> None:
    (folder / "config.json").write_text(to_json(load_config(str(ROOT / "tests/tiny_config.py"))))


def run_files(folder: Path) -> None:
    run_config(folder)
    write_json(
        folder / "run.json", {"records": "r", "versions": {"jax": "0"}, "evaluation": "p.omnidrive.json"}
    )
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    table = {"1s": 0.1, "2s": 0.2, "3s": None, "avg": 0.2}
    scores = {"samples": 3, "l2": table, "collision": table, "intersection": table}
    interval: dict[str, Any] = {
        name: {"1s": [0.1, 0.2], "avg": None} for name in ("l2", "collision", "intersection")
    }
    interval |= {"level": 0.95, "scenes": 2}
    evaluation = {
        **{"protocol": "omnidrive", **scores, "baselines": {"standing_still": scores}, "notes": ["a note"]},
        **{
            "coverage": {"records": 4, "eligible": 3, "counted": 3, "share": 1.0},
            "confidence": interval,
            "failures": 0,
        },
        "records": {"directory": "r", "split": "val", "fingerprint": "f", "version": "v1.0"},
    }
    write_json(folder / "p.omnidrive.json", evaluation)


def bench2drive(folder: Path) -> None:
    kinds = ("Accident", "ParkingCutIn", "T_Junction", "HighwayExit", "InvadingTurn")
    records = [
        {
            **{"index": number, "route_id": f"RouteScenario_{number}_rep0", "scenario_name": f"{kind}_1"},
            **{
                "save_name": f"r{number}",
                "status": "Completed" if number % 2 else "Failed - Agent timed out",
            },
            "infractions": {
                "collisions_vehicle": ["Agent collided"] * (number % 3),
                "min_speed_infractions": ["Average speed is 85.5% of the surrounding traffic's one"],
                "outside_route_lanes": ["Agent went outside its route lanes (2.5% of the completed route)"],
            },
            "scores": {"score_route": 100, "score_penalty": 0.6, "score_composed": 60.0},
        }
        for number, kind in enumerate(kinds)
    ]
    write_json(folder / "results.json", {"_checkpoint": {"records": records, "progress": [5, 5]}})
    write_json(folder / "junctions.json", {str(number): 0.5 for number in range(5)})
    routes = "".join(f'<route id="{number}" town="Town12"/>' for number in range(6))
    (folder / "routes.xml").write_text(f"<routes>{routes}</routes>")
    vectors = ("acceleration", "angular_velocity", "forward_vector", "right_vector")
    motion = {str(step): {name: [1.0, 0.1, 0.0] for name in vectors} for step in range(45)}
    write_json(folder / "motion.json", motion)


def bench2drive_scores(folder: Path) -> Any:
    results = read_results([folder / "results.json"])
    scores = score_routes(results, read_route_set(folder / "routes.xml"))
    rates = ability_rates(results, read_junctions(folder / "junctions.json"))
    return [
        *(scores.driving_score, scores.success_rate, scores.efficiency or 0.0),
        *(rate or 0.0 for rate in rates.values()),
        100 * comfort(read_motion(folder / "motion.json")),
    ]


def percentages(found: Any, whole: Any) -> bool:
    """Finite and not negative; all but the efficiency, the third, at most 100."""
    return finite(found, whole) and all(
        0 <= value <= (1000 if place == 2 else 100) for place, value in enumerate(found)
    )


def counterfactual(folder: Path) -> None:
    subject = "PT, [(+1.20, 0.0), (+2.40, 0.0)]"
    candidates = [{"traj": subject, "status": ["Collision"]}, {"traj": "PT, [(+9.0, 0.0)]", "status": []}]
    answers = {"t": [{"Q": f"If you follow {subject}, what would happen?", "A": "a Collision"}]}
    (folder / "answers.json").write_text(json.dumps(answers))
    lines = [{"token": "t", **answers["t"][0]}, {"token": "u", **answers["t"][0]}]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "truth.json").write_text(json.dumps({"t": candidates}))
    (folder / "truth").mkdir()
    (folder / "truth/t.pkl").write_bytes(pickle.dumps(candidates))


def risks(folder: Path) -> Any:
    pairs = [("answers.json", "truth.json"), ("answers.jsonl", "truth")]
    read = [read_items(folder / answers, folder / truth) for answers, truth in pairs]
    return [count_risks(items.items, rule) for items in read for rule in ("published", "corrected")]


def clip(folder: Path) -> None:
    unit = np.eye(4).tolist()
    box = {"class": "ego_vehicle", "world2ego": unit, "id": "1", "extent": [2.0, 1.0, 0.8]}
    car: dict[str, Any] = {
        **box,
        "class": "vehicle",
        "id": "2",
        "type_id": "vehicle.audi.tt",
        "location": [5.0, 1.0, 0.5],
    }
    car |= {"world2vehicle": unit, "center": [5.0, 1.0, 0.5], "rotation": [0, 0, 0], "speed": 1.0}
    cameras = ("FRONT", "FRONT_RIGHT", "FRONT_LEFT", "BACK", "BACK_LEFT", "BACK_RIGHT")
    intrinsic = [[1140.0, 0.0, 800.0], [0.0, 1140.0, 450.0], [0.0, 0.0, 1.0]]
    sensors = {
        f"CAM_{name}": {
            **{"intrinsic": intrinsic, "cam2ego": unit, "world2cam": unit, "fov": 70},
            **{"image_size_x": 1600, "image_size_y": 900},
        }
        for name in cameras
    }
    sensors["LIDAR_TOP"] = {"lidar2ego": unit, "world2lidar": unit}
    frame = {
        **{"x": 1.0, "y": 2.0, "theta": 0.1, "speed": 3.0, "acceleration": [0, 0, 9.8], "command_near": 4},
        **{"angular_velocity": [0, 0, 0], "x_command_near": 1.0, "y_command_near": 2.0, "command_far": 4},
        **{"x_command_far": 1.0, "y_command_far": 2.0, "bounding_boxes": [box, car], "sensors": sensors},
    }
    (folder / "00000.json").write_text(json.dumps(frame))


def frame_of(folder: Path) -> Any:
    frame, anno = read_frame(read_bytes(folder / "00000.json", most=1 << 24), 0, "00000.json", Counter())
    calibration = read_calibration(anno, "00000.json")
    return frame, calibration


def drives(folder: Path) -> None:
    values = [{"kind": "start", "town": "singapore-onenorth", "seed": seed} for seed in range(3)]
    (folder / "drives.json").write_text(json.dumps(values))


def drive_run(folder: Path) -> None:
    name = "0000-start-boston-seaport-0"
    pdm = {each.name: 1.0 for each in dataclasses.fields(PdmScore)} | {"pdms": 0.5, "epdms": 0.5}
    record = {
        **{"index": 0, "route_id": "RouteScenario_7_rep0", "scenario_name": "start_1", "status": "Completed"},
        **{"infractions": {"red_light": ["ran a red light"]}, "pdm": pdm, "neuro_ncap": 5.0, "failures": {}},
        "scores": {"score_route": 100.0, "score_penalty": 0.7, "score_composed": 70.0},
    }
    pose = [1.0, 2.0, 0.1]
    waypoints = [[float(step), 0.0] for step in range(1, 7)]
    trace = {
        **{
            "step_s": 0.1,
            "ego": [[*pose, 3.0, 0.1, 0.0], [2.0, 2.0, 0.1, 3.0, 0.1, 0.0]],
            "route": [[0, 0], [9, 0]],
        },
        **{"route": [[0, 0], [9, 0]], "road": [[[0, 0], [9, 0], [9, 9]]], "lanes": [[[0, 0], [9, 0]]]},
        "others": [{"category": "vehicle.car", "size": [4.0, 2.0], "poses": [pose, pose], "key": "a"}],
        "decisions": [{"time": 0.0, "pose": pose, "waypoints": waypoints}],
    }
    write_json(folder / "drives" / name / "result.json", record)
    write_json(folder / "drives" / name / "trace.json", trace)
    write_json(folder / "run.json", {"set": "test"})
    finish([DriveSpec(0, "start", "boston-seaport", 0)], folder)


def drives_page(folder: Path) -> Any:
    page = write_page(folder).read_text()
    finish([DriveSpec(0, "start", "boston-seaport", 0)], folder)
    return page


def markup(found: Any, whole: Any) -> bool:
    """Nothing of a file reaches the page as markup."""
    return "<script>" not in found and "nan" not in found.lower().split("<svg", 1)[-1]


def message(folder: Path) -> None:
    record = make_record(np.random.default_rng(6))
    (folder / "act.msgpack").write_bytes(pack(act_message(record, 3, 1.5)))


def message_record(folder: Path) -> Any:
    try:
        sent = unpack((folder / "act.msgpack").read_bytes())
    except PolicyError as error:  # what a client is told; it stands by itself in CARLA's Python
        raise DataError(str(error)) from error
    return {name: value for name, value in partial_record(sent).items() if name != "agent_velocity"}


def model_targets() -> list[Target]:
    """Sidecars, checkpoints, weights, tokenizers, configs, results."""
    llava = golden_file("llava_plus_train", "config.json")
    qwen = golden_file("qwen_plus_train", "config.json")
    unidepth = golden_file("unidepth_tiny", "config.json")
    shapes = SafetensorsFolder(GOLDEN / "unidepth_tiny").shapes()
    arguments = "arguments.json"
    return [
        Target("depth sidecar: chunks", sidecar, "chunk-*", sidecar_values, equal, BYTES),
        Target("depth sidecar: JSON", sidecar, "*.json", sidecar_values, equal, JSON),
        Target("checkpoint", checkpoint, "run/checkpoints/7/**/*", checkpoint_values, equal, BYTES),
        Target("sharded weights", sharded, "model*", tensors_of, finite, (edit_json, *BYTES)),
        Target("PEFT adapter", adapter, "adapter*", lambda f: plain(read_peft_config(f)), finite, JSON),
        Target("tokenizer", tokenizer, "*.json", encoded, anything, JSON),
        Target("config.json: Qwen", qwen, "config.json", lambda f: plain(read_hf_config(f)), finite, JSON),
        Target("config.json: LLaVA", llava, "config.json", lambda f: plain(read_hf_config(f)), finite, JSON),
        Target(
            *("config.json: UniDepth", unidepth, "config.json"),
            *(lambda f: plain(read_config(f, shapes)), finite, JSON),
        ),
        Target("weights.json", weights_json, "*.json", WeightsMetadata.read, anything, JSON),
        Target(
            *("published arguments", published, arguments),
            *(lambda f: published_meaning(f / arguments), finite, JSON),
        ),
        Target(
            *("depth network", network_json, "net.json"),
            *(lambda f: DepthNetworkConfig.from_file(f / "net.json"), finite, JSON),
        ),
        Target("config of a run", run_config, "*.json", lambda f: plain(config_of_run(f)), finite, JSON),
        Target("files of a run", run_files, "*.json*", read_run, anything, JSON),
        Target(
            "Bench2Drive results", bench2drive, "*.*", bench2drive_scores, percentages, (edit_json, *BYTES)
        ),
        Target("Bench2Drive clip", clip, "*.json", frame_of, finite, JSON),
        Target("counterfactual", counterfactual, "**/*.*", risks, anything, (edit_json, *BYTES)),
        Target("message to a server", message, "*.msgpack", message_record, finite, MESSAGE),
        Target("run of drives", drive_run, "**/*.json", drives_page, markup, JSON),
        Target(
            *("scenarios", drives, "*.json"),
            *(lambda f: drive_set(str(f / "drives.json")), finite, JSON),
        ),
    ]

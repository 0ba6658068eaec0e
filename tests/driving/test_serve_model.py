"""A checkpoint that is served answers what `predict` writes, and so does its export."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spacedrive_jax.config import to_json
from spacedrive_jax.data.depth_sources import DepthConfig
from spacedrive_jax.data.lidar import apply
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.driving import model_policy
from spacedrive_jax.driving.client import PolicyClient
from spacedrive_jax.driving.model_policy import ModelPolicy, open_depth_network, warm_up_record
from spacedrive_jax.driving.protocol import act_message
from spacedrive_jax.errors import CheckpointError, ConfigError, SpaceDriveError
from spacedrive_jax.inference.answers import Generation
from spacedrive_jax.inference.depth_network import camera_alignments
from spacedrive_jax.inference.generate import planning_step
from spacedrive_jax.inference.open_model import open_config
from spacedrive_jax.inference.open_planner import export_planner, open_planner
from spacedrive_jax.inference.planner import BatchPlanner, longest_prompt, open_exported, write_export
from spacedrive_jax.inference.predict import predict
from spacedrive_jax.models.families import family_of
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import abstract_state
from spacedrive_jax.training.step import batch_spec
from tests.conftest import ROOT
from tests.models.depth.sweeps import walls_around
from tests.record_factory import make_record
from tests.training.runs import make_records, save_untrained, tiny


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A run, its records and what `predict` says about them."""
    folder = tmp_path_factory.mktemp("serve")
    records = make_records(folder / "records")
    run = save_untrained(tiny(records, folder / "run"))
    predict(run, records, "train", folder / "predictions.jsonl", batch_size=2)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return run, open_records(records, "train"), lines


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_served_process_answers_like_predict(case, devices):
    run, records, lines = case
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "spacedrive_jax", "serve", "--checkpoint", str(run), "--port", "0"]
    if devices > 1:
        command += ["--mesh", f"data={devices}"]
    process = subprocess.Popen(
        [*command, "--batch-size", str(devices), "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    try:
        url = process.stdout.readline().split()[-1]
        client = PolicyClient(url)
        metadata = client.connect()
        assert (metadata["model"], metadata["image_size"]) == ("tiny", [56, 56])
        for row in range(3):
            answer = client.act(act_message(records[row], row, row / 2))
            assert (answer["text"], answer["status"]) == (lines[row]["text"], lines[row]["status"])
        process.send_signal(signal.SIGTERM)  # with a session open
        facts = json.loads(process.stdout.readlines()[-1])
        assert process.wait(30) == 0
        assert (facts["requests"], facts["sessions"], facts["refused"]) == (3, 1, 0)
    finally:
        process.kill()


def test_exported_answers_are_equal(case, tmp_path, unchecked):
    # Unchecked: annotated shapes are compared as numbers, which an unknown batch size has none of.
    run, records, lines = case
    facts = export_planner(run, tmp_path / "exported", warm_up_record(), most=2)
    assert facts["batch"] == "any"
    exported, own = open_exported(tmp_path / "exported", most=4), open_planner(run, warm_up_record(), most=4)
    assert exported.length == own.length
    samples = [own.sample(records[row]) for row in range(3)]
    for ours, theirs, line in zip(own.plan(samples), exported.plan(samples), lines, strict=False):
        assert (theirs.text, theirs.status) == (ours.text, ours.status) == (line["text"], line["status"])
        assert theirs.waypoints.tolist() == ours.waypoints.tolist()


def test_a_model_that_is_opened_again_compiles_nothing_anew(tmp_path):
    config, steps = tiny(tmp_path, tmp_path), []
    mesh = make_mesh(config.mesh)
    for _ in range(2):
        graph, _, _ = abstract_state(config, mesh)
        tokenizer = load_tokenizer(config.data.tokenizer, family_of(config.model.vlm).chat)
        steps.append(planning_step(graph, mesh, config, tokenizer))
    assert steps[0] is steps[1]


@pytest.mark.usefixtures("unchecked")
def test_an_export_goes_size_by_size_only_where_the_size_is_what_fails(tmp_path, caplog):
    caplog.set_level(logging.INFO, "spacedrive_jax")
    config = tiny(tmp_path, tmp_path)
    example = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), batch_spec(config, 1))
    answered = ("lengths", "is_coordinate", "is_position", "in_one_pass", "waypoints", "coordinates")

    def compares(weights, batch):
        scale = 1 if batch.size > 2 else 2
        return Generation(token_ids=batch.token_ids, **dict.fromkeys(answered, scale * batch.lengths))

    def fails(weights, batch):
        raise RuntimeError("the compiler's own trouble")

    weights = {"0": jnp.zeros(1)}
    written = write_export(tmp_path / "sizes", to_json(config), weights, compares, example, most=4)
    assert written["batch"] == [1, 2, 4]
    assert "no program for any batch size (InconclusiveDimensionOperation: " in caplog.text
    with pytest.raises(RuntimeError, match="the compiler's own trouble"):
        write_export(tmp_path / "none", to_json(config), weights, fails, example, most=4)
    assert not (tmp_path / "none").exists()


def test_exported_runs_without_the_models_source(case, tmp_path, unchecked):
    run, _, _ = case
    folder = tmp_path / "exported"
    export_planner(run, folder, warm_up_record(), most=1)
    code = (
        "import sys; from pathlib import Path\n"
        "from spacedrive_jax.inference.planner import open_exported\n"
        "from spacedrive_jax.driving.model_policy import ModelPolicy\n"
        f"policy = ModelPolicy(open_exported(Path({str(folder)!r}), most=1)); policy.warm_up()\n"
        "print('spacedrive_jax.models.spacedrive' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.split()[-1] == "False"

    weights, facts = folder / "weights.safetensors", folder / "export.json"
    assert weights.stat().st_mode == facts.stat().st_mode  # readable by whoever may read the others
    said = facts.read_text()
    facts.write_text(said.replace('"length": ', '"length": 1'))
    with pytest.raises(CheckpointError, match=r"export\.json is not what was exported"):
        open_exported(folder)
    facts.write_text(said.replace('"length"', '"lengths"'))
    with pytest.raises(SpaceDriveError, match=r"export\.json: .*`length`.*export it again"):
        open_exported(folder)
    facts.write_text(said)
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    with pytest.raises(CheckpointError, match="not what was exported"):
        open_exported(folder)


def test_a_model_without_visual_positions_needs_no_depth(case):
    run, _, _ = case
    config = open_config(run)
    record = warm_up_record() | {"exact_depth": [b""] * 6}
    with pytest.raises(SpaceDriveError, match="no depth"):
        SampleBuilder(config.data, config.model, answer=False)(record, 0)
    model = dataclasses.replace(config.model, visual_positions="none")
    sample = SampleBuilder(config.data, model, answer=False)(record, 0)
    assert not sample.patch_depth.any()


def test_fused_depth_is_fitted_to_the_sweep_of_the_request(tmp_path, monkeypatch):
    """A network that sees everything at 6 m, walls at 12: as add-depth would fit it."""
    config = tiny(tmp_path / "records", tmp_path / "run")
    data = dataclasses.replace(config.data, depth=DepthConfig(sources=("fused",)))
    builder = SampleBuilder(data, config.model, answer=False)
    config, grid = dataclasses.replace(config, data=data), builder.images.token_grid
    length = longest_prompt(builder, warm_up_record())
    planner = BatchPlanner(config, builder, lambda batch: batch, (1,), length)
    seen = np.full((1, 6, *data.image_size), 6.0, np.float32), np.full((1, 6, *grid), 6.0, np.float32)
    monkeypatch.setattr(model_policy, "KeyframeDepth", lambda network: lambda records: seen)
    policy = ModelPolicy(planner, open_depth_network(Path("weights"), planner.config))
    given = []
    planner.plan = lambda samples: given.extend(samples) or []

    record = make_record(np.random.default_rng(0), lidar=walls_around(12.0))
    policy.run([policy.prepare(act_message(record, 0, 0.0))])
    fitted = camera_alignments(record, seen[0][0])
    assert all(each.points for each in fitted)
    for camera, alignment in enumerate(fitted):
        np.testing.assert_array_equal(given[0].patch_depth[camera], apply(seen[1][0, camera], alignment))
    assert given[0].patch_depth.min() > 7
    with pytest.raises(SpaceDriveError, match="no depth for CAM_FRONT from fused"):
        policy.prepare(act_message(record | {"lidar": b""}, 0, 0.0))


def test_depth_that_nobody_gives_is_refused(case, tmp_path):
    run, _, _ = case
    planner = open_planner(run, warm_up_record(), most=1)
    for sources, said in (
        (("unidepth",), "--depth-model WEIGHTS"),
        (("fused",), "fused: give --depth-model"),
    ):
        data = dataclasses.replace(planner.config.data, depth=DepthConfig(sources=sources))
        planner.config = dataclasses.replace(planner.config, data=data)
        with pytest.raises(ConfigError, match=said):
            ModelPolicy(planner)

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from data_prep.add_depth import add_depth
from data_prep.cli import AddDepth
from spacedrive_jax.data.depth_sources import DepthConfig, open_depth_cache, record_patch_depth
from spacedrive_jax.data.lidar import apply
from spacedrive_jax.data.records import RecordSource, open_records
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.inference.depth_network import DepthNetworkConfig, KeyframeDepth
from tests.models.depth.sweeps import walls_around
from tests.models.depth.tiny_unidepth import save_tiny
from tests.record_factory import make_record, write_records

GRID = (2, 3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network") / "weights"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def network(weights):
    return DepthNetworkConfig(weights=str(weights), image_size=(42, 56), grid=GRID)


@pytest.fixture
def records(tmp_path):
    rng = np.random.default_rng(0)
    made = [make_record(rng, lidar=walls_around(12.0)), make_record(rng)]
    return write_records(tmp_path / "records", {"train": made[:1], "val": made[1:]})


def test_cached_depth_is_the_networks_and_fusion_fits_it_to_lidar(records, network):
    opened = open_records(records)
    added = add_depth(opened, network, full=True)
    assert (added.keyframes, added.reused) == (2, 0)
    assert 0 < added.aligned <= 6  # the second keyframe has no sweep
    full, pooled = KeyframeDepth(network)([opened[0]])

    config = DepthConfig(sources=("unidepth",))
    cache = open_depth_cache(opened, config, GRID)
    first, second = (opened[index] for index in range(2))
    cached, of_second = cache.read(first["token"]), cache.read(second["token"])
    depth, used = record_patch_depth(first, GRID, config, cached)
    assert used == ["unidepth"] * 6
    np.testing.assert_allclose(depth, pooled[0], atol=1 / 256)
    finer, _ = record_patch_depth(first, (6, 8), config, cached)  # the full depth serves any grid
    assert finer.min() == pytest.approx(full.min(), abs=1 / 256)

    fused = DepthConfig(sources=("fused", "unidepth"))
    corrected, used = record_patch_depth(first, GRID, fused, cached)
    for camera, source in enumerate(used):
        alignment = cached.alignments[camera]
        assert (source == "fused") == (alignment.points > 0)
        np.testing.assert_allclose(corrected[camera], apply(depth[camera], alignment), rtol=1e-6)
    _, used = record_patch_depth(second, GRID, fused, of_second)
    assert used == ["unidepth"] * 6
    only = DepthConfig(sources=("fused",))
    with pytest.raises(SpaceDriveError, match="no depth for CAM_FRONT from fused"):
        record_patch_depth(second, GRID, only, of_second)


def stop_at_second(monkeypatch):
    """Reading is interrupted after the first record."""
    read = RecordSource.__getitem__

    def until_second(source, index):
        if index > 0:
            raise KeyboardInterrupt
        return read(source, index)

    monkeypatch.setattr(RecordSource, "__getitem__", until_second)


def test_a_stopped_run_goes_on_and_gives_the_same(records, network, monkeypatch):
    monkeypatch.setattr("data_prep.add_depth.CHUNK", 1)
    opened = open_records(records)

    with monkeypatch.context() as patch:
        stop_at_second(patch)
        with pytest.raises(KeyboardInterrupt):
            add_depth(opened, network)
    config = DepthConfig(sources=("unidepth",))
    with pytest.raises(SpaceDriveError, match="no finished depth of unidepth"):
        open_depth_cache(opened, config, GRID)
    added = add_depth(opened, network)
    assert added.reused == 1
    cache = open_depth_cache(opened, config, GRID)
    _, pooled = KeyframeDepth(network)([opened[0], opened[1]])
    for index in range(2):
        depth, _ = record_patch_depth(opened[index], GRID, config, cache.read(opened[index]["token"]))
        np.testing.assert_allclose(depth, pooled[index], rtol=1e-5)


def test_foreign_and_unfit_caches_are_refused(records, network):
    opened = open_records(records)
    add_depth(opened, network)
    config = DepthConfig(sources=("unidepth",))
    converted_again = dataclasses.replace(opened, fingerprint="0" * 16)
    with pytest.raises(SpaceDriveError, match="made from other records"):
        open_depth_cache(converted_again, config, GRID)
    with pytest.raises(SpaceDriveError, match="begun for other records"):
        add_depth(converted_again, network)
    add_depth(opened, network)
    with pytest.raises(SpaceDriveError, match="2x3 tokens, the run needs min of 4x4"):
        open_depth_cache(opened, config, (4, 4))
    with pytest.raises(SpaceDriveError, match="min-pooled depth of 2x3 tokens, the run needs mean of 2x3"):
        open_depth_cache(opened, dataclasses.replace(config, pooling="mean"), GRID)
    with pytest.raises(SpaceDriveError, match="no finished depth of depth_anything"):
        open_depth_cache(opened, DepthConfig(sources=("depth_anything",)), GRID)
    add_depth(opened, dataclasses.replace(network, channel_order="bgr"))
    with pytest.raises(ConfigError, match=r"cache 'named' .* \(exact, lidar\) takes none: name unidepth"):
        open_depth_cache(opened, DepthConfig(sources=("exact", "lidar"), cache="named"), GRID)
    with pytest.raises(SpaceDriveError, match="several depth caches"):
        open_depth_cache(opened, config, GRID)


def test_command(records, network, tmp_path):
    file = tmp_path / "network.json"
    file.write_text(json.dumps(dataclasses.asdict(network)))
    facts = AddDepth(records, file).run()
    assert (facts["keyframes"], facts["cameras"]) == (2, 12)
    assert facts["fingerprint"] == network.fingerprint()
    file.write_text('{"weight": "x"}')
    with pytest.raises(SpaceDriveError, match="does not describe a depth network"):
        AddDepth(records, file).run()
    file.write_text(json.dumps(dataclasses.asdict(network) | {"grid": [57, 57]}))
    with pytest.raises(SpaceDriveError, match=r"grid \[57, 57\] has more tokens than image_size \[42, 56\]"):
        AddDepth(records, file).run()


def test_flags_that_make_no_sense_are_refused(records, weights):
    with pytest.raises(SpaceDriveError, match="--keyframes-per-step 0 must be 1 or more"):
        AddDepth(records, weights, keyframes_per_step=0).run()
    with pytest.raises(SpaceDriveError, match="need --coordinator HOST:PORT"):
        AddDepth(records, weights, num_processes=2).run()
    assert not (records / "depth").exists()


def test_damage_is_named_by_the_checksums(records, network):
    opened = open_records(records)
    folder = Path(add_depth(opened, network, full=True).folder)
    config, token = DepthConfig(sources=("unidepth",)), opened[0]["token"]
    chunk, provenance = folder / "chunk-00000.safetensors", folder / "provenance.json"
    whole, said = chunk.read_bytes(), provenance.read_bytes()
    tensors = load(whole)
    depth = tensors["patch_depth"][0].tobytes()
    damaged = bytearray(whole)
    damaged[whole.index(depth) + 2] ^= 1  # one bit of one depth
    chunk.write_bytes(damaged)
    with pytest.raises(DataError, match=r"chunk-00000.* is damaged .*checksum of row 0 differs.*add-depth"):
        open_depth_cache(opened, config, GRID).read(token)
    chunk.write_bytes(whole)
    np.testing.assert_array_equal(
        open_depth_cache(opened, config, GRID).read(token).patch_depth, tensors["patch_depth"][0]
    )
    provenance.write_bytes(said.replace(b'"min"', b'"mean"', 1))
    with pytest.raises(DataError, match="is not as add-depth wrote it; remove"):
        open_depth_cache(opened, config, GRID)

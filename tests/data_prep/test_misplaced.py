"""Archives unpacked one folder off are named, not left out."""

import json
import shutil

import pytest

from data_prep.cli import Convert
from spacedrive_jax.errors import DataError
from tests.data_prep.tiny_nuscenes import VERSION, road_expansion


def convert(dataroot, out):
    return Convert(dataroot=dataroot, version=VERSION, out=out).run()


@pytest.mark.parametrize("folder", ["can_bus/can_bus", "nuscenes/can_bus", "."])
def test_can_bus(dataroot, tmp_path, folder):
    target = dataroot / folder
    target.mkdir(parents=True, exist_ok=True)
    shutil.move(dataroot / "can_bus/scene-2001_pose.json", target)
    with pytest.raises(
        DataError, match=r"scene-2001_pose\.json is one folder off: it is read as .*can_bus/s"
    ):
        convert(dataroot, tmp_path / "out")


@pytest.mark.parametrize("folder", ["maps", "maps/nuScenes-map-expansion-v1.3/expansion", "expansion"])
def test_map_expansion(dataroot, tmp_path, folder):
    (dataroot / folder).mkdir(parents=True, exist_ok=True)
    (dataroot / folder / "tiny-town.json").write_text(json.dumps(road_expansion()))
    with pytest.raises(DataError, match=r"maps/expansion/tiny-town\.json"):
        convert(dataroot, tmp_path / "out")


def test_sweeps_and_images(dataroot, tmp_path):
    (dataroot / "more").mkdir()
    shutil.move(dataroot / "samples/LIDAR_TOP", dataroot / "more/LIDAR_TOP")
    with pytest.raises(DataError, match=r"more/LIDAR_TOP/.*is read as .*samples/LIDAR_TOP"):
        convert(dataroot, tmp_path / "out")
    shutil.move(dataroot / "more/LIDAR_TOP", dataroot / "samples/LIDAR_TOP")
    shutil.move(dataroot / "samples", dataroot / "more/samples")
    (dataroot / "samples").mkdir()
    shutil.move(dataroot / "more/samples/LIDAR_TOP", dataroot / "samples/LIDAR_TOP")
    with pytest.raises(DataError, match=r"more/samples/CAM_.* one folder off"):
        convert(dataroot, tmp_path / "out")


@pytest.mark.parametrize("version", ["1.0", "1.2", None])
def test_old_map_expansions_are_refused(dataroot, tmp_path, version):
    (dataroot / "maps/expansion").mkdir()
    expansion = {**road_expansion(), "version": version}
    if version is None:
        del expansion["version"]
    (dataroot / "maps/expansion/tiny-town.json").write_text(json.dumps(expansion))
    with pytest.raises(DataError, match=r"tiny-town\.json .*version.* of the map expansion"):
        convert(dataroot, tmp_path / "out")


def test_links_of_the_owner_may_lead_elsewhere(dataroot, tmp_path):
    """Folders are often assembled from links; only names in the tables are confined."""
    shutil.move(dataroot / "samples", tmp_path / "disk")
    (dataroot / "samples").symlink_to(tmp_path / "disk")
    assert convert(dataroot, tmp_path / "out")["skipped"] == 0

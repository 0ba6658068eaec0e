"""A records folder of somebody else's: held against its provenance and our schema before it is read."""

import json
import re
import shutil

import numpy as np
import pytest

from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.records_folder import END_BYTES, check_contents
from spacedrive_jax.data.schema import own_record
from spacedrive_jax.errors import DataError
from tests.record_factory import make_record, write_records


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    rng = np.random.default_rng(3)
    records = {"train": [make_record(rng) for _ in range(3)], "val": [make_record(rng) for _ in range(2)]}
    return write_records(tmp_path_factory.mktemp("records") / "r", records)


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "r")


def shard(folder, split="val"):
    return next(folder.glob(f"*-{split}.array_record-*"))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_whole_folder_is_read(folder):
    assert [len(open_records(folder, split)) for split in ("train", "val", "all")] == [3, 2, 5]
    assert open_records(folder).splits == {"train", "val"}
    assert check_contents(folder) == 2


def test_what_is_no_records_folder_is_called_what_it_is(folder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "begun" / "conversion").mkdir(parents=True)
    (tmp_path / "begun" / "conversion" / "plan.json").write_text("{}")
    (tmp_path / "nuscenes" / "v1.0-mini").mkdir(parents=True)
    (tmp_path / "nuscenes" / "v1.0-mini" / "scene.json").write_text("[]")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "empty").mkdir()
    for name, said in {
        "nowhere": "nothing has this name",
        "link": "a link to nothing",
        "r/features.json": "a file; give the folder",
        "begun": "was interrupted; the same command with --resume",
        ".": f"{folder} is one",
        "nuscenes": f"convert --dataroot {tmp_path / 'nuscenes'} --version v1.0-mini --out",
        "run": "a run or of weights; give the records",
        "run/empty": "it has no provenance.json",
    }.items():
        with pytest.raises(DataError, match=re.escape(said)):
            open_records(tmp_path / name)


def test_class_named_in_features_is_refused(folder):
    def name_a_class(content):
        content["featuresDict"]["features"]["token"]["pythonClassName"] = "evil.Text"

    edit(folder / "features.json", name_a_class)
    with pytest.raises(DataError, match=r"features\.json.*'token'"):
        open_records(folder)


def test_feature_of_another_shape_or_unknown_is_refused(folder):
    original = (folder / "features.json").read_text()
    edit(
        folder / "features.json",
        lambda content: content["featuresDict"]["features"].update(more={"text": {}}),
    )
    with pytest.raises(DataError, match="also has the feature 'more'"):
        open_records(folder)
    (folder / "features.json").write_text(original.replace('"float64"', '"float32"'))
    with pytest.raises(DataError, match="has another type for the feature"):
        open_records(folder)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "provenance.json"])
@pytest.mark.parametrize("content", ["{", "[]", "null", "\xff", '{"a": NaN}', "[" * 5000])
def test_damaged_json_is_named(folder, name, content):
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        open_records(folder)


def test_shard_of_another_split_or_folder_is_named(folder, tmp_path):
    rng = np.random.default_rng(4)
    other = write_records(tmp_path / "other", {"val": [make_record(rng) for _ in range(2)]})
    assert shard(other).stat().st_size == shard(folder).stat().st_size
    shutil.copy(shard(other), shard(folder))
    with pytest.raises(DataError, match=r"-val\.array_record-00000-of-00001 is not the shard"):
        open_records(folder, "train")


def test_missing_or_cut_shard_is_named(folder):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{path.name} has .* bytes"):
        open_records(folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name}.*no such file"):
        open_records(folder)


@pytest.mark.usefixtures("unchecked")
def test_damage_in_the_middle_is_found_by_the_check_and_named_when_read(folder):
    path = shard(folder)
    data = bytearray(path.read_bytes())
    place = data.rindex(b"testtown")
    assert END_BYTES < place < len(data) - END_BYTES
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="1 of 2 shards are damaged"):
        check_contents(folder)
    records = open_records(folder)
    assert len([records[index] for index in range(3)]) == 3, "the other shard is whole"
    with pytest.raises(DataError, match=rf"{path.name}.*--resume"):
        [records[index] for index in range(3, 5)]


def test_fingerprint_must_be_that_of_the_shards(folder):
    edit(folder / "provenance.json", lambda content: content.update(fingerprint="0" * 64))
    with pytest.raises(DataError, match="fingerprint is not that of its shards"):
        open_records(folder)


@pytest.mark.usefixtures("unchecked")
def test_impossible_values_name_keyframe_and_feature(tmp_path):
    rng = np.random.default_rng(5)
    record = make_record(rng, camera_intrinsics=np.full((6, 3, 3), np.nan))
    folder = write_records(tmp_path / "r", {"train": [record]})
    with pytest.raises(DataError, match=f"{record['token']}, camera_intrinsics is not finite"):
        open_records(folder)[0]


@pytest.mark.usefixtures("unchecked")
def test_records_are_taken_by_number_from_either_end_and_by_slice(folder):
    records = open_records(folder)
    tokens = [record["token"] for record in records]
    assert records[-1]["token"] == records[np.int64(4)]["token"] == tokens[4]
    assert [record["token"] for record in records[3:]] == tokens[3:]
    with pytest.raises(IndexError, match=r"no keyframe 5: split all of .* has 5"):
        records[5]
    for wrong in (tokens[0], 1.0, None):
        with pytest.raises(DataError, match="taken by number or slice"):
            records[wrong]


@pytest.mark.usefixtures("unchecked")
def test_a_record_of_ones_own_is_made_what_records_are(folder):
    record = open_records(folder)[0]
    lists = {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in record.items()
    }
    made = own_record(lists | {"token": record["token"].encode(), "something": 3})
    assert made.keys() == record.keys()
    for name, value in record.items():
        np.testing.assert_array_equal(made[name], value)
        assert np.asarray(made[name]).dtype == np.asarray(value).dtype
    for name, value, said in (
        (
            "waypoints",
            np.zeros((5, 2)),
            r"waypoints is of shape \(5, 2\), expected float64 .*\(6, 2\)",
        ),
        ("can_bus", None, "can_bus is of"),
        ("can_bus", record["can_bus"] * np.nan, "can_bus is not finite"),
        ("past_mask", [1, 1], "past_mask is of int64, expected bool"),
        ("command_route", 2**40, "command_route holds numbers beyond"),
        ("images", record["images"][:5], "images holds 5 blobs, expected 6"),
        ("images", b"", "images is bytes, expected a list"),
        ("location", 3, "location holds int, expected text"),
        ("agent_category", [], "agent_category is of 0 agents"),
    ):
        with pytest.raises(DataError, match=said):
            own_record(record | {name: value})

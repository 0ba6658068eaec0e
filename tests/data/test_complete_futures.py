import dataclasses

import numpy as np
import pytest

from spacedrive_jax.data.loader import training_samples
from spacedrive_jax.data.records import complete_futures, open_records
from spacedrive_jax.errors import ConfigError
from tests.record_factory import make_record, write_records
from tests.training.runs import tiny


class Unreadable:
    """A source that must not be asked for a record."""

    def __init__(self, length):
        self.data_source, self.length = self, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        raise AssertionError("records were read again")

    def decode(self, index, features):
        raise AssertionError("records were read again")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    masks = np.ones((4, 6), bool)
    masks[1, 4:] = masks[3, 5:] = False
    records = [make_record(rng, waypoint_mask=mask) for mask in masks]
    return write_records(tmp_path / "records", {"train": records, "val": records[:2]})


def test_found_once_for_each_split(folder):
    records = open_records(folder, "train")
    assert complete_futures(records).tolist() == [True, False, True, False]
    assert complete_futures(open_records(folder, "val")).tolist() == [True, False]


def test_too_few_are_counted_apart_from_those_left_out(folder, tmp_path):
    config = tiny(folder, tmp_path / "run")
    assert config.data.drop_without_future
    with pytest.raises(ConfigError, match=r"has 2 train keyframes.*batch_size 3 \(.* leaves out 2 without"):
        training_samples(config.data, config.model, 3)


@pytest.mark.usefixtures("unchecked")
def test_kept_in_the_cache_and_not_beside_the_records(folder):
    before = sorted(folder.iterdir())
    records = open_records(folder, "train")
    first = complete_futures(records)
    kept = dataclasses.replace(records, source=Unreadable(len(records)))
    np.testing.assert_array_equal(complete_futures(kept), first)
    others = dataclasses.replace(kept, fingerprint="of other records")
    with pytest.raises(AssertionError, match="read again"):
        complete_futures(others)
    assert sorted(folder.iterdir()) == before


def test_a_damaged_note_or_a_read_only_cache_costs_time_only(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SPACEDRIVE_CACHE", str(tmp_path / "cache"))
    records = open_records(folder, "train")
    expected = complete_futures(records)
    (note,) = (tmp_path / "cache" / "complete_futures").iterdir()
    note.write_text("{")
    np.testing.assert_array_equal(complete_futures(records), expected)
    note.unlink()

    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr("os.replace", refuse)
    np.testing.assert_array_equal(complete_futures(records), expected)
    assert not list(note.parent.iterdir())

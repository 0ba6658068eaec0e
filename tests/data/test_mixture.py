"""Several records folders in one run, each with its share."""

import collections
import dataclasses

import numpy as np
import pytest

from spacedrive_jax.data.loader import position, records_sources, seek, training_iterator, training_samples
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.training.train import train
from tests.training.runs import losses_of, make_records, tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    first, second = make_records(folder / "a", seed=1), make_records(folder / "b", seed=2)
    whole = tiny(first, folder / "run")
    data = dataclasses.replace(whole.data, records=f"{first}:3,{second}:1", sequence_length=224)
    return dataclasses.replace(whole, data=data)


def iterator(config):
    samples = training_samples(config.data, config.model, config.train.batch_size)
    settings = {"batch_size": config.train.batch_size, "seed": config.train.seed}
    return samples, training_iterator(samples, config.data, **settings)


def test_shares_and_order(config):
    samples, batches = iterator(config)
    assert len(samples) == 20
    rows = np.concatenate([next(batches).index for _ in range(20)])  # 80 samples
    of_first = rows < 10
    assert of_first.sum() == 60
    for start in range(0, 80, 8):  # of every stretch, not on the whole alone
        assert 5 <= of_first[start : start + 8].sum() <= 7
    counts = collections.Counter(rows.tolist())
    assert {counts[row] for row in range(10)} == {6}
    assert {counts[row] for row in range(10, 20)} == {2}
    assert samples.records[12]["token"] == samples.parts[1].records[2]["token"]
    _, again = iterator(config)
    np.testing.assert_array_equal(rows, np.concatenate([next(again).index for _ in range(20)]))


def test_goes_on_where_it_was(config):
    _, batches = iterator(config)
    for _ in range(7):
        next(batches)
    where = position(batches, config.train.batch_size)
    wanted = [next(batches).index for _ in range(5)]
    _, other = iterator(config)
    seek(other, where, config.train.batch_size)
    np.testing.assert_array_equal(wanted, [next(other).index for _ in range(5)])


def test_a_run_on_two_folders_resumes_to_the_same_losses(config, tmp_path):
    settings = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    train(settings)
    whole = losses_of(tmp_path / "run")
    assert [step for step, _ in whole] == [1, 2, 3, 4]
    train(settings, resume=True, step=2)
    assert losses_of(tmp_path / "run")[-2:] == whole[-2:]


def test_what_cannot_be_read(tmp_path):
    assert records_sources("data/records") == [("data/records", 1.0)]
    assert records_sources("a:1, b:3") == [("a", 0.25), ("b", 0.75)]
    assert records_sources("gs://bucket/a:1,b:1")[0] == ("gs://bucket/a", 0.5)
    odd = tmp_path / "a,b"
    odd.mkdir()
    assert records_sources(str(odd)) == [(str(odd), 1.0)]
    for text, said in (
        ("a,b", "'a' has no positive weight"),
        ("a:1,b:0", "'b:0' has no"),
        ("a:1,a:2", "twice"),
        ("a:1,b/../a/:2", "twice"),
    ):
        with pytest.raises(ConfigError, match=said):
            records_sources(text)

"""Train and validation scenes."""

import pytest

from data_prep.nuscenes.scenes import OFFICIAL_SPLITS, split_scenes


def test_official_lists_have_the_published_sizes():
    trainval = OFFICIAL_SPLITS["v1.0-trainval"]
    assert (len(trainval["train"]), len(trainval["val"])) == (700, 150)
    assert not trainval["train"] & trainval["val"]
    mini = OFFICIAL_SPLITS["v1.0-mini"]
    assert mini["val"] == {"scene-0103", "scene-0916"}
    assert len(mini["train"]) == 8
    # The first and last of the devkit's lists, and some at the edges of runs.
    assert {"scene-0001", "scene-1110", "scene-0161"} <= trainval["train"]
    assert {"scene-0003", "scene-1073", "scene-0802"} <= trainval["val"]


def test_official_version_with_official_names():
    splits, rule = split_scenes("v1.0-mini", ["scene-0103", "scene-0061"])
    assert splits == {"scene-0103": "val", "scene-0061": "train"}
    assert rule == "official"


def test_official_scenes_keep_their_split_under_any_version_and_beside_own_scenes():
    official = {"scene-0003": "val", "scene-0012": "val", "scene-0001": "train", "scene-0002": "train"}
    assert split_scenes("v1.0-subset", list(official)) == (official, "official")
    own = [f"scene-{index}" for index in range(2001, 2011)]
    splits, rule = split_scenes("v1.0-trainval", [*official, *own])
    assert rule == "official, others hashed"
    assert official.items() <= splits.items()
    assert sum(splits[name] == "val" for name in own) == 2


def test_mini_has_lists_of_its_own():
    """Scenes of mini's train list are of trainval's val list."""
    assert split_scenes("v1.0-mini", ["scene-0553"])[0] == {"scene-0553": "train"}
    assert split_scenes("v1.0-trainval", ["scene-0553"])[0] == {"scene-0553": "val"}


def test_synthetic_scenes_only_share_the_numbering():
    _, rule = split_scenes("v1.0-synthetic", ["scene-0001", "scene-0003"])
    assert rule == "hashed"


@pytest.mark.parametrize(("count", "val"), [(1, 0), (2, 1), (3, 1), (10, 2), (50, 10)])
def test_hashed_split_sizes(count, val):
    names = [f"own-{index:04d}" for index in range(count)]
    splits, rule = split_scenes("v1.0-own", names)
    assert rule == "hashed"
    assert sum(split == "val" for split in splits.values()) == val


def test_hashed_split_depends_on_seed_and_not_on_order():
    names = [f"own-{index:04d}" for index in range(40)]
    assert split_scenes("v", names, 1)[0] == split_scenes("v", names[::-1], 1)[0]
    assert split_scenes("v", names, 1)[0] != split_scenes("v", names, 2)[0]

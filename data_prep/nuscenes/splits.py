"""Which scenes are for training and which for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

_TRAINVAL_VAL = (
    "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 "
    "775 777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073"
)
_TRAINVAL_TRAIN = (
    "1-2 4-11 19-34 41-76 120-135 138-139 149-152 154-155 157-168 170-185 187-188 190-196 199-200 202-204 "
    "206-214 218-220 222 224-264 283-306 315-318 321 323-324 328 347-386 388-403 405-408 410-459 461-465 "
    "467-469 471-472 474-480 499-502 504-515 517-518 525-539 541-546 566 568 570-578 580 582-600 639-679 681 "
    "683-689 695-698 700-701 703-719 726-728 730-731 733-741 744 746-747 749-752 757-765 767-769 786-787 "
    "789-792 803-806 808-813 815-817 819-822 847-856 858 860-866 868-873 875-878 880 882-903 945 947 949 "
    "952-953 955-961 975-984 988-992 994-1025 1044-1058 1074-1102 1104-1110"
)
_MINI_TRAIN = "61 553 655 757 796 1077 1094 1100"
_MINI_VAL = "103 916"

FALLBACK_VAL_SHARE = 0.2


def _scene_names(ranges: str) -> frozenset[str]:
    names: set[str] = set()
    for item in ranges.split():
        first, _, last = item.partition("-")
        names.update(f"scene-{number:04d}" for number in range(int(first), int(last or first) + 1))
    return frozenset(names)


OFFICIAL_SPLITS: Mapping[str, Mapping[str, frozenset[str]]] = {
    "v1.0-trainval": {"train": _scene_names(_TRAINVAL_TRAIN), "val": _scene_names(_TRAINVAL_VAL)},
    "v1.0-mini": {"train": _scene_names(_MINI_TRAIN), "val": _scene_names(_MINI_VAL)},
}
"""Version to split to scene names, as published with nuScenes (700/150 and 8/2 scenes)."""


SYNTHETIC_VERSION = "v1.0-synthetic"
"""Written by `synthesize`, whose scenes share nuScenes' numbering and nothing else."""


def split_scenes(version: str, scene_names: Sequence[str], seed: int = 0) -> tuple[dict[str, str], str]:
    """Assigns every scene to `train` or `val`.

    A scene of the official lists is on them by its name, whatever else is in the tables: mini goes by its own
    lists, every other version by trainval's. Other scenes (a synthetic world, an own recording) are split by
    rank of the SHA-256 of seed and name: the first fifth of them goes to `val`, at least one scene when there
    are two or more; a single scene is for training. The scenes of `v1.0-test`, which have no annotations to
    train on, all go to `val`.

    Args:
        version: the nuScenes version, such as `v1.0-mini`.
        scene_names: all scenes of that version's tables.
        seed: changes the hashed split; the official lists ignore it.

    Returns:
        Scene name to split, and the rule that was used: `official`, `hashed` or `official, others hashed`.
    """
    if version == "v1.0-test":
        return dict.fromkeys(scene_names, "val"), "official"
    listed = {} if version == SYNTHETIC_VERSION else _listed(version)
    official = {name: listed[name] for name in scene_names if name in listed}
    others = [name for name in scene_names if name not in official]
    ranked = sorted(others, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    val_count = max(1, round(FALLBACK_VAL_SHARE * len(ranked))) if len(ranked) > 1 else 0
    val = set(ranked[:val_count])
    splits = {name: official.get(name) or ("val" if name in val else "train") for name in scene_names}
    rule = "hashed" if not official else "official, others hashed" if others else "official"
    return splits, rule


def _listed(version: str) -> dict[str, str]:
    lists = [OFFICIAL_SPLITS["v1.0-trainval"]]
    if version in OFFICIAL_SPLITS:
        lists.append(OFFICIAL_SPLITS[version])
    return {name: split for each in lists for split, names in each.items() for name in names}

"""Rules of the published tools at the edges of their inputs, against torch, SciPy, transformers and loops.

The re-implementations follow docs/fidelity.md and share no code with the project. Inputs are the degenerate
ones: none, one, many, repeated, at the end, exactly at a bound.
"""

import itertools
import math

import numpy as np
import pytest
from scipy.signal import savgol_filter

from spacedrive_jax.data.ego_status import released_command
from spacedrive_jax.data.keyframe import can_bus_at
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.evaluation.bench2drive import RouteResult, ability_rates, comfort, score_routes
from spacedrive_jax.evaluation.counterfactual import Item, count_risks, parse_candidates
from spacedrive_jax.models.coordinate_encoder import encode, fone_frequencies, frequencies, nerf_frequencies
from spacedrive_jax.models.depth.depth_anything import DepthAnythingConfig
from spacedrive_jax.models.depth.unidepth import inference_size
from spacedrive_jax.models.unprojection import patch_centres, pool_depth, unproject

torch = pytest.importorskip("torch", reason="parity tests need torch")
dpt = pytest.importorskip("transformers.models.dpt.image_processing_pil_dpt")

from tests.parity.spacedrive.torch_model import waves  # noqa: E402

pytestmark = pytest.mark.parity

BESIDE = 1e-7
"""Degrees and metres beside a bound: further than any rounding."""


def plain_command(x, y):
    if math.hypot(x, y) < 0.5:
        return 0
    angle = math.degrees(math.atan2(y, x))
    inner = [bound for bound in (0.4, 2, 10, 20) if abs(angle) > bound]
    return len(inner) if len(inner) < 2 or angle > 0 else len(inner) + 3


@pytest.mark.parametrize("metres", [0.5, 0.6, 30.0])
def test_commands_beside_every_bound(metres):
    degrees = [sign * (b + s * BESIDE) for b in (0.4, 2, 10, 20, 90) for s in (-1, 1) for sign in (-1, 1)]
    for angle, length in itertools.product(degrees, (metres - BESIDE, metres + BESIDE)):
        x, y = length * math.cos(math.radians(angle)), length * math.sin(math.radians(angle))
        assert released_command(np.array([x, y, 0.0])) == plain_command(x, y), (angle, length)
    for x, y in ((0, 0), (1, 0), (1, -0.0), (-1, 0.0), (-1, -0.0), (0, 1), (0, -1)):
        assert released_command(np.array([x, y, 0.0])) == plain_command(x, y), (x, y)


def message(time, value):
    vector = [value, value + 0.1, value + 0.2]
    return {
        "utime": time,
        "orientation": [value] * 4,
        "accel": vector,
        "rotation_rate": vector,
        "vel": vector,
    }


@pytest.mark.parametrize("times", [[100], [100, 100], [100, 200], [100, 200, 200, 200, 300]])
def test_can_bus_at_messages_before_between_and_behind(times):
    messages = [message(time, float(index)) for index, time in enumerate(times)]
    for now in (0, 99, 100, 101, 199, 200, 201, 300, 301, 10**9):
        before = [each for each in messages if each["utime"] <= now]
        after = [each for each in messages if each["utime"] > now]
        still, moving = (before or messages[:1])[-1], (after or messages[-1:])[0]
        expected = [*still["orientation"], *moving["accel"], *moving["rotation_rate"], *moving["vel"]]
        np.testing.assert_array_equal(can_bus_at(messages, np.array([now]))[0], expected)


POINTS = [[0, 0, 0], [-0.0, 1e-6, -1e-6], [50, -50, 3], [1000, 1000, -1000], [0.01, 0.02, 0.03]]


@pytest.mark.parametrize("width", [1, 2, 3, 5, 6, 7, 12, 13, 64, 80])
@pytest.mark.parametrize("kind", ["transformer", "nerf", "fone"])
def test_encodings_of_any_width(width, kind):
    axis = 2 * math.ceil(width / 6)
    table, base, tolerance = {
        "transformer": (frequencies(axis), 20000, 2e-4),
        "nerf": (nerf_frequencies(axis, 2), 2, 2e-3),
        "fone": (fone_frequencies(24, 10, 0.5), 10, 2e-3),
    }[kind]
    arguments = {"pe_type": kind, "pe_freq_coeff": base, "pe_freq_scaling": 0.5 if kind == "fone" else 1}
    points = np.array(POINTS, np.float32)
    theirs = waves(arguments | {"fone_dim": 24}, torch.tensor(points), width).numpy()
    ours = np.asarray(encode(points, table, width))
    assert ours.shape == (len(points), width)
    np.testing.assert_allclose(ours, theirs, atol=tolerance)


@pytest.mark.parametrize(
    ("size", "grid"), [((10, 14), (2, 3)), ((3, 3), (5, 4)), ((1, 1), (1, 1)), ((28, 7), (4, 1))]
)
def test_points_of_holes_lie_at_the_camera(size, grid):
    depth = np.random.default_rng(0).uniform(1, 60, (3, *size)).astype(np.float32)
    depth[0] = 0.0  # nothing known
    depth[1, size[0] // 2 :] = 0.0  # a window with one unknown pixel is unknown
    depth[2, 0, 0] = 1e-6
    pooled = pool_depth(depth, grid)
    projection = np.tile(np.diag([300.0, 280.0, 1.0, 1.0]), (3, 1, 1)).astype(np.float32)
    projection[:, :3, 3] = [[1.0, -0.5, 1.5]] * 3
    points = np.asarray(unproject(pooled, patch_centres(grid, 14), projection))
    row_edges, column_edges = (
        [round(index * side / cells) for index in range(cells + 1)]
        for side, cells in zip(size, grid, strict=True)
    )
    for view, row, column in np.ndindex(3, *grid):
        rows, columns = row_edges[row : row + 2], column_edges[column : column + 2]
        window = torch.tensor(depth[view, rows[0] : rows[1], columns[0] : columns[1]])
        nearest = float(window.min()) if window.numel() else 0.0
        floor = max(nearest, 1e-5)
        pixel = torch.tensor([(column + 0.5) * 14 * floor, (row + 0.5) * 14 * floor, nearest, 1.0])
        expected = torch.linalg.inv(torch.tensor(projection[view])) @ pixel
        np.testing.assert_allclose(points[view, row, column], expected[:3], atol=2e-4)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.5])
def test_depth_network_sizes_around_the_legal_ratios(ratio):
    for height, extra in itertools.product((1, 2, 7, 14, 100, 511, 640, 2001), (-1, 0, 1)):
        width = max(1, int(height * ratio) + extra)
        aspect = width / height
        if not 0.5 <= aspect <= 2.5:
            legal = min(max(aspect, 0.5), 2.5)
            padded = (int(width / legal), width) if aspect > legal else (height, int(height * legal))
        else:
            padded = (height, width)  # replaced: the published code may lose a column here (Q29)
        pixels = padded[0] * padded[1]
        factor = math.sqrt(min(max(pixels, 200_000), 600_000) / pixels)
        network = tuple(math.ceil(int(side * factor) / 14) * 14 for side in padded)
        found = inference_size(
            (height, width), ratio_bounds=(0.5, 2.5), pixel_bounds=(200_000, 600_000), multiple=14
        )
        assert (found.padded, found.network) == (padded, network), (height, width)


def test_depth_anything_sizes_are_transformers():
    network_size = DepthAnythingConfig().network_size
    for size in itertools.product((14, 259, 336, 511, 518, 525, 640, 900, 1600), repeat=2):
        image = np.zeros((3, *size), np.uint8)
        found = dpt.get_resize_output_image_size(image, (518, 518), True, 14)
        theirs = found.height, found.width
        if min(theirs) >= 14:
            assert network_size(size) == theirs, size


def route(number, kinds=(), status="Completed", speeds=(), completion=100.0, score=None):
    found = {kind: ["once, on 50.0% of the way"] for kind in kinds}
    found["min_speed_infractions"] = [f"Average speed is {speed}% of the surrounding" for speed in speeds]
    kept = completion if score is None else score
    return RouteResult(str(number), "T_Junction", f"r{number}", status, completion, kept, found)


FULL = [route(number) for number in range(220)]
SETS = {
    "one": [route(0)],
    "whole": FULL,
    "whole_but_one": FULL[:-1],
    "all_failed": [route(n, status="Failed - Agent timed out", completion=0.0) for n in range(220)],
    "every_kind_once": [
        route(n, [kind], score=50.0)
        for n, kind in enumerate(
            ("red_light", "route_dev", "vehicle_blocked", "outside_route_lanes", "new_kind")
        )
    ],
    "slow_is_no_offence": [route(0, speeds=[3.0]), route(1, status="Perfect", speeds=[0])],
    "speeds_at_the_bound": [route(0, speeds=["1000.0", "1000.01", 40]), route(1, speeds=["1000.01"])],
    "no_speed_at_all": [route(0), route(1, ["stop_infraction"], score=80.0)],
    "complete_but_failed": [route(0, status="Failed - TickRuntime")],
}


@pytest.mark.parametrize("name", SETS)
def test_bench2drive_scores(name):
    results = SETS[name]
    total = good = 0.0
    means = []
    for each in results:
        total += each.score
        offences = [
            kind for kind, said in each.infractions.items() if said and kind != "min_speed_infractions"
        ]
        good += each.status in ("Completed", "Perfect") and not offences
        said = [float(text.split("%")[0].split()[-1]) for text in each.infractions["min_speed_infractions"]]
        kept = [speed for speed in said if not speed > 1000]
        if kept:
            means.append(sum(kept) / len(kept))
    for routes, size in ((None, 220), ([str(number) for number in range(300)], 300)):
        found = score_routes(results, routes)
        assert found.driving_score == pytest.approx(total / size, abs=1e-12)
        assert found.success_rate == pytest.approx(100 * good / size, abs=1e-12)
        assert found.efficiency == (pytest.approx(sum(means) / len(means)) if means else None)
        assert found.missing == size - len(results)


def test_bench2drive_sets_that_cannot_be_scored():
    with pytest.raises(SpaceDriveError, match="no result of a route in the set"):
        score_routes([])
    with pytest.raises(SpaceDriveError, match="221 results for a set of 220"):
        score_routes([*FULL, route(220)])


def test_a_sign_route_that_ends_at_its_junction_has_not_passed_it():
    failed = [route(n, status="Failed - x", completion=percent) for n, percent in enumerate((50.0, 50.1))]
    junctions = {"0": 0.5, "1": 0.5}
    rates = ability_rates(failed, junctions)
    assert (rates["traffic_signs"], rates["traffic_signs_0_0_3"]) == (50, 25)
    assert ability_rates(failed[:1], junctions)["traffic_signs"] == 0
    assert set(ability_rates([], junctions).values()) == {None}


BOUNDS = {"along": (-4.05, 2.40), "aside": (-4.89, 4.89), "jerk": (-8.37, 8.37), "jerk_along": (-4.13, 4.13)}


def comfortable(motion):
    def smooth(values, derivative=0):
        return savgol_filter(values, 7, 2, deriv=derivative, delta=0.1)

    along, aside = ((motion[:, 0, :2] * motion[:, axis, :2]).sum(axis=1) for axis in (2, 3))
    size = smooth(np.sqrt((motion[:, 0, :2] ** 2).sum(axis=1)))
    values = {
        "along": smooth(along),
        "aside": smooth(aside),
        "jerk": smooth(size, 1),
        "jerk_along": smooth(smooth(along), 1),
    }
    turning = np.abs(smooth(motion[:, 1, 2])).max() < 0.95
    return turning and all(
        np.all((values[k] > low) & (values[k] < high)) for k, (low, high) in BOUNDS.items()
    )


@pytest.mark.parametrize("steps", [7, 8, 19, 20, 21, 39, 40, 41, 59, 60, 61])
def test_comfort_in_pieces_is_scipys(steps):
    random, seen = np.random.default_rng(steps), set()
    for strength in (0.0, 0.2, 0.5, 1.0, 3.0, 10.0):
        motion = np.zeros((steps, 4, 3))
        motion[:, 0] = strength * random.standard_normal((steps, 3))
        motion[:, 1, 2] = 0.2 * strength * random.standard_normal(steps)
        motion[:, 2, 0] = motion[:, 3, 1] = 1
        whole = [motion] if steps <= 20 else [motion[s : s + 20] for s in range(0, steps - 19, 20)]
        expected = sum(map(comfortable, whole)) / len(whole)
        assert comfort(motion) == pytest.approx(expected)
        seen.add(expected)
    assert {0.0, 1.0} <= seen


WORDS = ("Collision", "collision", "red", "reduced", "the drivable area", "safe", "")
NAMES = {
    "Collision": "collision",
    "Run the red light": "red_light",
    "Out of the drivable area": "drivable_area",
}
FRAGMENTS = {"collision": "Collision", "red_light": "red", "drivable_area": "drivable area"}


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_counterfactual_counts_of_any_set(count):
    random = np.random.default_rng(count)
    texts = ["PT, [(+1.00, 0.0)]", "PT, [(+1.00, 0.0), (+2.00, 0.0)]", "PT, [(+9.00, 0.0)]"]
    items, tables, unmatched = [], {name: np.zeros((2, 2), int) for name in (*FRAGMENTS, "safe")}, 0
    for number in range(count):
        picked = [texts[index] for index in random.integers(0, 3, random.integers(0, 4))]
        annotated = [
            {
                "traj": text,
                "status": [name for name in NAMES if random.random() < 0.4] * random.integers(1, 3),
            }
            for text in picked
        ]
        asked = f"If you follow the trajectory {texts[random.integers(3)]}, what would happen?"
        answer = " and ".join(random.choice(WORDS, random.integers(0, 4)))
        items.append(Item(str(number), asked, answer, parse_candidates(annotated)))
        true = next((set(each["status"]) for each in annotated if each["traj"][5:-1] in asked), None)
        if true is None:
            unmatched += 1
            continue
        said = {risk for risk, fragment in FRAGMENTS.items() if fragment in answer}
        true = {NAMES[name] for name in true}
        for risk in FRAGMENTS:
            tables[risk][int(risk in said), int(risk in true)] += 1
        tables["safe"][int(not said), int(not true)] += 1
    counts, left = count_risks(items, "published")
    assert len(left) == unmatched
    for risk, table in tables.items():
        found = counts[risk]
        ours = [[found.true_negative, found.false_negative], [found.false_positive, found.true_positive]]
        np.testing.assert_array_equal(ours, table)
        precision = table[1, 1] / table[1].sum() if table[1].sum() else None
        assert found.to_json()["precision"] == precision

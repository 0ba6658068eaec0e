import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spacedrive_jax.data.prompts import (
    format_coordinates,
    format_number,
    parse_coordinates,
    replace_coordinates,
)
from spacedrive_jax.data.tokenizer import COORDINATE
from tests.conftest import ROOT

GOLDEN = json.loads((ROOT / "tests" / "golden" / "prompts" / "config.json").read_text())


@pytest.mark.parametrize("rule", ["train", "test"])
@pytest.mark.parametrize("row", GOLDEN["convert_coords"], ids=lambda row: row["text"][:30])
def test_replacement_equals_published(row, rule):
    replaced = replace_coordinates(row["text"], keep_velocities=rule == "train")
    assert replaced.text == row[rule]["text"]
    np.testing.assert_array_equal(
        replaced.coordinates, np.array(row[rule]["coords"], np.float32).reshape(-1, 2)
    )


def test_velocity_takes_all_up_to_the_bracket():
    text = "velocity: (about (1.0, 2.0)), at (3.0, 4.0)"
    assert (
        replace_coordinates(text, keep_velocities=True).text
        == f"velocity: (about (1.0, 2.0)), at {COORDINATE}"
    )
    assert len(replace_coordinates(text, keep_velocities=False).coordinates) == 2


def test_numbers_equal_published():
    for row in GOLDEN["format_number"]:
        assert format_number(row["n"], 1) == row["d1"]
        assert format_number(row["n"], 2) == row["d2"]


coordinate = st.floats(-60, 60).map(lambda value: round(value, 2)).filter(lambda value: abs(value) > 0.02)


@given(st.lists(st.tuples(coordinate, coordinate), max_size=8))
def test_written_points_are_found_again(points):
    text = f"[{format_coordinates(np.array(points).reshape(-1, 2))}]"
    np.testing.assert_allclose(parse_coordinates(text), np.array(points).reshape(-1, 2), atol=1e-9)
    replaced = replace_coordinates(text, keep_velocities=True)
    assert replaced.text == f"[{', '.join([COORDINATE] * len(points))}]"
    np.testing.assert_allclose(replaced.coordinates, np.array(points).reshape(-1, 2), atol=1e-5)

"""Comparisons with the published code: in float32 as users get it, with the arrays that torch hands over."""

from collections.abc import Iterator

import pytest
from jaxtyping import config


@pytest.fixture(scope="module", autouse=True)
def numpy_for_jax() -> Iterator[None]:
    """Annotations ask for JAX's arrays where here NumPy's are handed over, as torch gives them."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)

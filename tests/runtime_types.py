"""The runtime type checker of the tests: annotated types and array shapes hold in every call.

Configs and commands are left out: they check what a user writes into them by themselves, in words of their
own, and the tests hand them wrong values to see that. Python's numeric tower applies: an int serves where a
float is annotated, as the typing specification has it.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from beartype import BeartypeConf, beartype

F = TypeVar("F", bound=Callable[..., Any])
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))
_CONFIGS = ("Config", "Fault", "Disturbance")
_COMMANDS = ("spacedrive_jax.cli.", "data_prep.cli")


def check(function: F) -> F:
    """Checks a function's annotations at every call, unless it makes a config or a command."""
    owner, _, name = getattr(function, "__qualname__", "").rpartition(".")
    if (owner, name) == ("DrivingBatch", "__init__"):
        return _of_arrays_alone(function)
    checks_itself = owner.endswith(_CONFIGS) or function.__module__.startswith(_COMMANDS)
    return function if name == "__init__" and checks_itself else _beartype(function)


def _of_arrays_alone(function: F) -> F:
    """jax also rebuilds a batch with whatever it has in its arrays' places: shardings, axes, nothing."""
    checked = _beartype(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        fields = [*args[1:], *kwargs.values()]
        whole = all(hasattr(field, "shape") and hasattr(field, "dtype") for field in fields)
        return (checked if whole else function)(*args, **kwargs)

    return cast(F, functools.wraps(function)(call))

"""Reading pickled results of other projects without running what they name.

A pickle is a program: it may call anything importable. Here it may build plain containers and numpy arrays,
and everything else it asks for is refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from spacedrive_jax.console import UserError

_NUMPY_MODULES = tuple(
    f"numpy.{core}.{module}" for core in ("core", "_core") for module in ("multiarray", "numeric")
)
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),  # bytes in protocol 2 and below
    *((module, name) for module in _NUMPY_MODULES for name in ("_reconstruct", "scalar", "_frombuffer")),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def load_plain(path: Path) -> Any:
    """Loads a pickle of numbers, texts, containers and numpy arrays.

    Raises:
        UserError: the file cannot be read, is no pickle, or holds anything else.
    """
    try:
        with path.open("rb") as stream:
            return _PlainUnpickler(stream).load()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle may raise almost anything
        raise UserError(
            f"{path} is not a pickle of plain containers and numpy arrays ({error}); "
            f"write the trajectories as JSON instead"
        ) from None

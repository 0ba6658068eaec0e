"""Folds adapters and new-token rows into base weights, so that others can read a trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from spacedrive_jax.vlm.config import VLConfig
from spacedrive_jax.vlm.conversion import ParameterPath
from spacedrive_jax.vlm.vision_language import VisionLanguageModel

HEAD: ParameterPath = ("decoder", "head")
EMBEDDING: ParameterPath = ("decoder", "embedding")


class MergedParameters(Mapping[ParameterPath, np.ndarray]):
    """Base parameters with what was trained beside them folded in, worked out one at a time when read.

    A projection becomes kernel + scaling * A B (Hu et al. 2021), in float32 and then in the kernel's type;
    the tables' rows of new tokens become the trained ones. A tied head whose new rows differ from the
    embedding's is untied: see `config`.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        """Wraps a model; nothing is computed yet."""
        self._state = dict(nnx.to_flat_state(nnx.state(model)))
        self._lora, self._new_tokens = model.decoder.lora, model.decoder.new_tokens
        tied = model.config.decoder.tied_head
        self._untied = tied and self._new_tokens is not None
        self._paths = [path for path in self._state if self._is_base(path)] + [HEAD] * self._untied
        decoder = dataclasses.replace(model.config.decoder, tied_head=tied and not self._untied)
        self.config: VLConfig = dataclasses.replace(model.config, decoder=decoder)
        """Architecture of the merged model."""

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[ParameterPath]:
        return iter(self._paths)

    def __getitem__(self, path: ParameterPath) -> np.ndarray:
        """The merged parameter, on the host, in the base's type.

        Raises:
            KeyError: If there is no such base parameter.
        """
        if path not in self._paths:
            raise KeyError(path)
        value = self._host(EMBEDDING if self._untied and path == HEAD else path)
        if self._new_tokens is not None and path in (EMBEDDING, HEAD):
            rows = self._host(("decoder", "new_embedding" if path == EMBEDDING else "new_head"))
            value = value.copy()
            value[self._new_tokens.first_id :][: len(rows)] = rows.astype(value.dtype)
        adapter = (*path[:-1], "adapter")
        if path[-1] == "kernel" and (*adapter, "a") in self._state:
            value = self._with_adapter(value, self._host((*adapter, "a")), self._host((*adapter, "b")))
        return value

    def dtype(self, path: ParameterPath) -> Any:
        """Type of a merged parameter, without computing it."""
        return self._state[EMBEDDING if self._untied and path == HEAD else path].dtype

    def _with_adapter(self, kernel: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        assert self._lora is not None
        rank = self._lora.rank
        merged = np.empty_like(kernel)
        for layer in range(len(kernel)):
            update = a[layer].reshape(-1, rank) @ b[layer].reshape(rank, -1) * self._lora.scaling
            merged[layer] = kernel[layer].astype(np.float32) + update.reshape(kernel.shape[1:])
        return merged

    def _host(self, path: ParameterPath) -> np.ndarray:
        return np.asarray(jax.device_get(self._state[path][...]))

    @staticmethod
    def _is_base(path: ParameterPath) -> bool:
        return "adapter" not in path and path[-1] not in ("new_embedding", "new_head")

"""GGUF files (llama.cpp's): language models in one file, their weights in blocks of few bits.

What the format says of a block is worked out exactly: products of a half-precision scale and a small integer
are exact in float32, and so is every weight up to the one rounding that the format's own sum has.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.io import require_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_ENTRIES = 1 << 20
MOST_TEXT = 1 << 24
BLOCK = 32
"""Weights in a block of the quantised types."""


class _Scalar(NamedTuple):
    """How a number of the metadata is written."""

    form: str
    size: int


_SCALARS = {
    0: _Scalar("<B", 1),
    1: _Scalar("<b", 1),
    2: _Scalar("<H", 2),
    3: _Scalar("<h", 2),
    4: _Scalar("<I", 4),
    5: _Scalar("<i", 4),
    6: _Scalar("<f", 4),
    7: _Scalar("<?", 1),
    10: _Scalar("<Q", 8),
    11: _Scalar("<q", 8),
    12: _Scalar("<d", 8),
}
_TEXT, _ARRAY = 8, 9

Bytes = UInt8[np.ndarray, "blocks bytes"]


def _halves(raw: Bytes) -> Float[np.ndarray, "blocks n"]:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: Bytes) -> Float[np.ndarray, "blocks 32"]:
    """Low halves of the bytes first, then high halves."""
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.float32)


def _with_fifth_bit(raw: Bytes, bits: UInt8[np.ndarray, "blocks 4"]) -> Float[np.ndarray, "blocks 32"]:
    fifth = np.unpackbits(bits, axis=1, bitorder="little").astype(np.float32)
    return _nibbles(raw) + 16 * fifth


def _bfloat16(raw: Bytes) -> Float[np.ndarray, "blocks 1"]:
    return (np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << 16).view(np.float32)


class _Type(NamedTuple):
    """A tensor type: weights and bytes of a block, and how one becomes the other."""

    name: str
    weights: int
    size: int
    read: Callable[[Bytes], np.ndarray]


_TYPES = {
    0: _Type("F32", 1, 4, lambda raw: np.ascontiguousarray(raw).view("<f4").astype(np.float32)),
    1: _Type("F16", 1, 2, _halves),
    2: _Type("Q4_0", BLOCK, 18, lambda raw: (_nibbles(raw[:, 2:]) - 8) * _halves(raw[:, :2])),
    3: _Type(
        "Q4_1", BLOCK, 20, lambda raw: _nibbles(raw[:, 4:]) * _halves(raw[:, :2]) + _halves(raw[:, 2:4])
    ),
    6: _Type(
        "Q5_0",
        BLOCK,
        22,
        lambda raw: (_with_fifth_bit(raw[:, 6:], raw[:, 2:6]) - 16) * _halves(raw[:, :2]),
    ),
    7: _Type(
        "Q5_1",
        BLOCK,
        24,
        lambda raw: _with_fifth_bit(raw[:, 8:], raw[:, 4:8]) * _halves(raw[:, :2]) + _halves(raw[:, 2:4]),
    ),
    8: _Type(
        "Q8_0", BLOCK, 34, lambda raw: raw[:, 2:].view(np.int8).astype(np.float32) * _halves(raw[:, :2])
    ),
    30: _Type("BF16", 1, 2, _bfloat16),
}
_OTHERS = {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor lies."""

    shape: tuple[int, ...]
    kind: _Type
    start: int
    stop: int


class GgufFile:
    """Metadata and tensors of one file; tensors are read when asked for."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            CheckpointError: it is no GGUF file, is damaged or cut short, or has tensors of a type that is not
                read here.
        """
        self.path = path
        self.size = require_regular(path)
        self._bytes = np.memmap(path, np.uint8, mode="r") if self.size else np.zeros(0, np.uint8)
        self._at = 0
        if bytes(self._take(4)) != MAGIC:
            raise CheckpointError(f"{path} is no GGUF file: its first bytes are not {MAGIC.decode()}")
        version = self._number(4)
        if version not in VERSIONS:
            raise CheckpointError(f"{path} is GGUF of version {version}, this reads {VERSIONS}")
        tensors, entries = self._count(10), self._count(10)
        self.metadata: Mapping[str, Any] = dict(self._entry() for _ in range(entries))
        described = [self._described() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise CheckpointError(f"{path}: general.alignment is {alignment!r}, expected a number of bytes")
        start = math.ceil(self._at / alignment) * alignment
        self._places: dict[str, _Place] = {}
        for name, shape, kind, offset in described:
            size = math.prod(shape) // kind.weights * kind.size
            place = _Place(shape, kind, start + offset, start + offset + size)
            if name in self._places:
                raise CheckpointError(f"{path} has the tensor {name!r} twice")
            if place.stop > self.size:
                raise CheckpointError(
                    f"{path} is cut short: {name} ends at byte {place.stop:,}, the file at {self.size:,}"
                )
            self._places[name] = place

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor as torch has it: outputs first."""
        return {name: place.shape for name, place in self._places.items()}

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the types that occur."""
        return tuple(sorted({place.kind.name for place in self._places.values()}))

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor, float32."""
        place = self._places[name]
        raw = np.asarray(self._bytes[place.start : place.stop]).reshape(-1, place.kind.size)
        return place.kind.read(raw).astype(np.float32).reshape(place.shape)

    def field(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A field of the metadata.

        Raises:
            CheckpointError: it is missing or of another type.
        """
        value = self.metadata.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} is {str(value)[:40]!r}, which cannot be")
        return value

    def _take(self, count: int) -> UInt8[np.ndarray, " n"]:
        if self._at + count > self.size:
            raise CheckpointError(f"{self.path} is cut short: its header ends behind byte {self.size:,}")
        self._at += count
        return self._bytes[self._at - count : self._at]

    def _number(self, kind: int) -> Any:
        scalar = _SCALARS[kind]
        return struct.unpack(scalar.form, bytes(self._take(scalar.size)))[0]

    def _count(self, kind: int, most: int = MOST_ENTRIES) -> int:
        count = self._number(kind)
        if count > most:
            raise CheckpointError(f"{self.path}: a count of {count:,} cannot be; is it damaged?")
        return int(count)

    def _text(self) -> str:
        raw = bytes(self._take(self._count(10, MOST_TEXT)))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: a text of its header is not UTF-8") from error

    def _entry(self) -> tuple[str, Any]:
        name = self._text()
        return name, self._value(self._number(4), name)

    def _value(self, kind: int, name: str, *, inside: bool = False) -> Any:
        if kind in _SCALARS:
            return self._number(kind)
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY and not inside:
            of = self._number(4)
            return [self._value(of, name, inside=True) for _ in range(self._count(10))]
        raise CheckpointError(f"{self.path}: {name} is of the type {kind}, which is not read here")

    def _described(self) -> tuple[str, tuple[int, ...], _Type, int]:
        name, axes = self._text(), self._count(4, 4)
        shape = tuple(reversed([self._count(10, 1 << 40) for _ in range(axes)]))
        kind, offset = self._number(4), self._number(10)
        if kind not in _TYPES:
            raise CheckpointError(
                f"{self.path}: {name} is of the type {_OTHERS.get(kind, kind)}, this reads "
                f"{', '.join(each.name for each in _TYPES.values())}"
            )
        if math.prod(shape) > 1 << 40 or not shape or shape[-1] % _TYPES[kind].weights:
            raise CheckpointError(
                f"{self.path}: {name} has the shape {shape}, which {_TYPES[kind].name} cannot have"
            )
        return name, shape, _TYPES[kind], offset


def without_rope_order(rows: Float[np.ndarray, "O I"], heads: int) -> Float[np.ndarray, "O I"]:
    """Queries or keys with each head's two halves one behind the other, as transformers rotates them.

    llama.cpp writes LLaMA's with the pairs that turn together side by side.
    """
    outputs, inputs = rows.shape
    pairs = rows.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


DECODER_NAMES = (
    ("token_embd", "model.language_model.embed_tokens"),
    ("output_norm", "model.language_model.norm"),
    ("output", "lm_head"),
)
BLOCK_NAMES = (
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
)


def decoder_names(layers: int) -> Iterator[tuple[str, str]]:
    """(name in the file, name in the tables of `weight_table`) of a LLaMA model's tensors."""
    for theirs, ours in DECODER_NAMES:
        yield f"{theirs}.weight", f"{ours}.weight"
    for layer in range(layers):
        for theirs, ours in BLOCK_NAMES:
            yield f"blk.{layer}.{theirs}.weight", f"model.language_model.layers.{layer}.{ours}.weight"

"""GGUF files (llama.cpp's): read, and imported as the language model of a SmolVLM with a fresh tower.

What the format says of a block of few bits is worked out exactly: products of a half-precision scale and a
small integer are exact in float32, and so is every weight up to the one rounding that the format's own sum
has. SmolVLM is SigLIP in front of SmolLM2: a SmolLM2 file gives the base its words, its tower has yet to see.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from spacedrive_jax.config import load_config
from spacedrive_jax.console import progress
from spacedrive_jax.data.tokenizer import load_tokenizer, read_tokenizer
from spacedrive_jax.errors import CheckpointError, ConfigError
from spacedrive_jax.interop.hf_config import format_of, write_hf_config
from spacedrive_jax.interop.importing import TABLES, ImportOptions, extend_tokenizer, with_mean_rows
from spacedrive_jax.interop.safetensors_folder import (
    PlannedTensor,
    new_folder,
    plan_shards,
    require_finite,
    write_tensors,
)
from spacedrive_jax.interop.weight_table import check_names_and_shapes, decoder_rules
from spacedrive_jax.interop.weights_folder import Fingerprint, WeightsMetadata
from spacedrive_jax.io import require_regular, write_part
from spacedrive_jax.json_files import write_json
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig
from spacedrive_jax.models.families import smolvlm
from spacedrive_jax.models.layers import INIT_STD

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


SEED = 0
"""Of the fresh tower."""
CONTROL = (3, 4)
"""Kinds of tokens that stand for themselves wherever they are spelled out."""


def import_gguf(source: Path, out: Path, options: ImportOptions) -> Mapping[str, Any]:
    """Imports a LLaMA language model from a GGUF file into a weights folder of a SmolVLM.

    The decoder's weights are those of the file, float32; the special tokens of SmolVLM's chat and the two
    coordinate tokens get rows that are the mean of all others. Tower and connector are drawn anew: of
    SmolVLM-256M's size, or of that of `options.preset`.

    Raises:
        CheckpointError: `out` exists, the file is damaged, or holds another model than a plain LLaMA.
        ConfigError: the preset's base is no SmolVLM.
    """
    file = GgufFile(source)
    decoder = read_decoder(file)
    vision = _tower(options.preset)
    written = _as_written(file, decoder)
    with new_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:
        if options.tokenizer is None:
            write_part(Path(scratch) / "tokenizer.json", read_gguf_tokenizer(file).to_str(pretty=True))
        tokens = extend_tokenizer(options.tokenizer or Path(scratch), folder, add=options.add_tokens)
        ids = read_tokenizer(folder / "tokenizer.json").get_vocab(with_added_tokens=True)
        first, rows = decoder.vocab_size, max(decoder.vocab_size, 1 + max(ids.values()))
        config = smolvlm.SmolVLMConfig(
            decoder=dataclasses.replace(decoder, vocab_size=rows),
            vision=vision,
            image_token_id=load_tokenizer(folder, smolvlm.FAMILY.chat).image,
        )
        form = format_of(config)
        rules = form.rules(config)
        fresh = _draw_tower(config)
        layers = {name: (rule, layer) for rule in rules for layer, name in enumerate(rule.source_names())}

        def stream() -> Iterator[tuple[str, np.ndarray]]:
            for name, (rule, layer) in progress(layers.items(), desc=f"import {source.name}", unit="tensor"):
                if name in written:
                    value = written.read(name)
                    if name in TABLES and rows > first:
                        value = with_mean_rows(value, first, rows - first)
                else:
                    value = fresh[rule.target]
                    value = rule.export(value if rule.layers is None else value[layer])
                yield form.hub_name(name), value

        sizes = {name: 4 * int(np.prod(rule.source_shape)) for name, (rule, _) in layers.items()}
        planned = [PlannedTensor(form.hub_name(name), size) for name, size in sizes.items()]
        write_json(folder / "config.json", write_hf_config(config), indent=2)
        fingerprint = Fingerprint()
        write_tensors(folder, fingerprint.watch(stream()), plan_shards(planned, options.max_shard_bytes))
        metadata = WeightsMetadata.of(smolvlm.FAMILY.name, source, fingerprint, new_tokens=tokens.indicator)
        metadata.write(folder)
    note = f"the tower is fresh (seed {SEED}): it has to learn to see; the file's weights were {file.types}"
    return {**dataclasses.asdict(metadata), "notes": [note]}


def read_decoder(file: GgufFile) -> LanguageModelConfig:
    """The architecture that a file's metadata gives.

    Raises:
        CheckpointError: it is no LLaMA, or has what this implementation does not (scaled or partial rotary
            embeddings, experts).
    """
    kind = file.field("general.architecture", str)
    if kind != "llama":
        raise CheckpointError(f"{file.path} holds a model of the architecture {kind!r}, expected 'llama'")
    unknown = [name for name in file.metadata if name.startswith(("llama.rope.scaling", "llama.expert"))]
    if unknown:
        raise CheckpointError(f"{file.path}: {', '.join(unknown)} is not supported, only plain LLaMA")

    def number(name: str) -> int:
        return int(file.field(f"llama.{name}", int))

    heads, width = number("attention.head_count"), number("embedding_length")
    head_dim = file.metadata.get("llama.rope.dimension_count", width // max(heads, 1))
    if head_dim != file.metadata.get("llama.attention.key_length", head_dim):
        raise CheckpointError(f"{file.path}: only part of each head is rotated, which is not supported")
    vocabulary = file.shapes.get("token_embd.weight", (0, 0))[0]
    try:
        return LanguageModelConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=number("feed_forward_length"),
            num_layers=number("block_count"),
            num_heads=heads,
            num_kv_heads=int(file.metadata.get("llama.attention.head_count_kv", heads)),
            head_dim=int(head_dim),
            rope_theta=float(file.metadata.get("llama.rope.freq_base", 10_000.0)),
            mrope_section=(int(head_dim) // 2,),
            # Written as float32: 1e-5 comes back as 9.999999747378752e-06.
            norm_eps=float(str(np.float32(file.field("llama.attention.layer_norm_rms_epsilon", float)))),
            qkv_bias=False,
            tie_word_embeddings="output.weight" not in file.shapes,
        )
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Written:
    """A file's tensors under the names of the tables."""

    file: GgufFile
    names: Mapping[str, str]
    heads: Mapping[str, int]
    """Heads of the tensors whose rows lie in llama.cpp's order, by the end of their names."""

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def read(self, name: str) -> np.ndarray:
        value = self.file.read(self.names[name])
        require_finite(value, f"{self.file.path}: {self.names[name]}")
        for end, heads in self.heads.items():
            if name.endswith(end):
                return without_rope_order(value, heads)
        return value


def _as_written(file: GgufFile, decoder: LanguageModelConfig) -> _Written:
    names = {ours: theirs for theirs, ours in decoder_names(decoder.num_layers)}
    if decoder.tie_word_embeddings:
        del names["lm_head.weight"]
    back = {theirs: ours for ours, theirs in names.items()}
    found = {back.get(name, name): shape for name, shape in file.shapes.items()}
    check_names_and_shapes(
        decoder_rules(decoder), found, origin=str(file.path), ignore=("rope_freqs.weight",)
    )
    if "rope_freqs.weight" in file.shapes and (file.read("rope_freqs.weight") != 1).any():
        raise CheckpointError(
            f"{file.path}: rope_freqs.weight scales the rotary frequencies, which is not supported, only "
            "plain LLaMA"
        )
    heads = {"q_proj.weight": decoder.num_heads, "k_proj.weight": decoder.num_kv_heads}
    return _Written(file, names, heads)


def _tower(preset: str | None) -> smolvlm.SiglipVisionConfig:
    if preset is None:
        return smolvlm.SmolVLMConfig.smolvlm_256m().vision
    vlm = load_config(preset).model.vlm
    if not isinstance(vlm, smolvlm.SmolVLMConfig):
        raise ConfigError(f"{preset} is a run on {type(vlm).__name__}: --config takes one on a SmolVLM here")
    return vlm.vision


def _draw_tower(config: smolvlm.SmolVLMConfig) -> Mapping[Any, np.ndarray]:
    """Fresh values of everything before the language model, by path, the same bits on every processor.

    Weights are uniform, of the standard deviation that training from nothing draws normally with.
    """
    model = nnx.eval_shape(lambda: smolvlm.SmolVLM(config, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    generator, widest = np.random.default_rng(SEED), np.float32(INIT_STD * math.sqrt(3.0))
    fresh: dict[Any, np.ndarray] = {}
    for path, variable in sorted(nnx.to_flat_state(nnx.state(model)), key=lambda item: str(item[0])):
        if path[0] == "decoder":
            continue
        if path[-1] in ("scale", "bias"):
            fresh[path] = np.full(variable.shape, path[-1] == "scale", np.float32)
        else:
            drawn = generator.random(variable.shape, np.float32)
            fresh[path] = (2 * drawn - 1) * widest
    return fresh


def read_gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """SmolLM2's tokenizer as the metadata has it, with the special tokens of SmolVLM's chat.

    Raises:
        CheckpointError: it is of another kind than SmolLM's byte-level BPE.
    """
    kind = (file.field("tokenizer.ggml.model", str), file.metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(
            f"{file.path} has a tokenizer of the kind {kind}, this reads ('gpt2', 'smollm'); give SmolLM2"
        )
    tokens, merges = (file.field(f"tokenizer.ggml.{name}", list) for name in ("tokens", "merges"))
    if not all(isinstance(each, str) for each in (*tokens, *merges)) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens are no distinct texts")
    pairs = [tuple(each.split(" ", 1)) for each in merges]
    try:
        tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, pairs))
    except Exception as error:  # tokenizers raises no kind of its own
        raise CheckpointError(f"{file.path}: its merges do not fit its tokens: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = file.metadata.get("tokenizer.ggml.token_type", [])
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind in CONTROL]
    special += smolvlm.FAMILY.chat.added_tokens
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer

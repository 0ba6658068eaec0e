"""A language model out of a GGUF file as that of a SmolVLM-shaped base, with a fresh tower.

SmolVLM is SigLIP in front of SmolLM2: a SmolLM2 file gives the base its words, its tower has yet to see.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from spacedrive_jax.config import load_config
from spacedrive_jax.console import progress
from spacedrive_jax.data.tokenizer import load_tokenizer, read_tokenizer
from spacedrive_jax.errors import CheckpointError, ConfigError
from spacedrive_jax.interop.gguf import GgufFile, decoder_names, without_rope_order
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
from spacedrive_jax.io import write_part
from spacedrive_jax.json_files import write_json
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig
from spacedrive_jax.models.families import smolvlm
from spacedrive_jax.models.layers import INIT_STD

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
    except Exception as error:
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

"""GGUF files: blocks read exactly, a tiny SmolLM2 becomes the decoder of a SmolVLM, damage is named."""

import json
import re
import struct

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from spacedrive_jax import open_model
from spacedrive_jax.cli.main import main
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.interop.gguf import GgufFile, decoder_names, without_rope_order
from spacedrive_jax.models.families import smolvlm

WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2
F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BF16 = 0, 1, 2, 3, 6, 7, 8, 30


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, value) -> bytes:
    """A metadata entry; whole numbers as uint32, others as float32."""
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        kind = 8 if isinstance(value[0], str) else 5
        items = b"".join(text(each) if kind == 8 else struct.pack("<i", each) for each in value)
        return text(name) + struct.pack("<IIQ", 9, kind, len(value)) + items
    form, kind = ("<f", 6) if isinstance(value, float) else ("<I", 4)
    return text(name) + struct.pack("<I", kind) + struct.pack(form, value)


def gguf(metadata: dict, tensors: dict) -> bytes:
    """A file of version 3; tensors are (shape, type, bytes)."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(entry(*item) for item in metadata.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += text(name) + axes + struct.pack("<IQ", kind, len(data))
        data += raw
    return header + b"\0" * (-len(header) % 32) + data


def q4_1(generator, shape) -> tuple[bytes, np.ndarray]:
    """Random blocks, and the weights they mean by the format's own sum, one after the other."""
    blocks = int(np.prod(shape)) // 32
    scales = generator.normal(0, 0.05, (blocks, 2)).astype(np.float16)
    levels = generator.integers(0, 16, (blocks, 32), dtype=np.uint8)
    raw = b"".join(
        scale.tobytes() + (row[:16] | row[16:] << 4).tobytes()
        for scale, row in zip(scales, levels, strict=True)
    )
    # In float64 both product and sum are exact, so that only the result is rounded.
    exact = levels * scales[:, :1].astype(np.float64) + scales[:, 1:].astype(np.float64)
    return raw, exact.astype(np.float32).reshape(shape)


def test_every_type_is_read_as_the_format_defines_it(tmp_path):
    generator = np.random.default_rng(0)
    halves = generator.normal(size=2).astype(np.float16)
    d, m = halves.astype(np.float64)
    low, high = generator.integers(0, 16, (2, 16))
    packed = (low | high << 4).astype(np.uint8).tobytes()
    bits = int(generator.integers(0, 1 << 32))
    fifth = np.array([bits >> place & 1 for place in range(32)])
    four, five = np.r_[low, high], np.r_[low, high] + 16 * fifth
    eight = generator.integers(-128, 128, 32).astype(np.int8)
    one, both, word = halves[:1].tobytes(), halves.tobytes(), struct.pack("<I", bits)
    plain = generator.normal(size=32).astype(np.float32)
    cases = {
        "q4_0": (Q4_0, one + packed, (four - 8) * d),
        "q4_1": (Q4_1, both + packed, four * d + m),
        "q5_0": (Q5_0, one + word + packed, (five - 16) * d),
        "q5_1": (Q5_1, both + word + packed, five * d + m),
        "q8_0": (Q8_0, one + eight.tobytes(), eight * d),
        "f32": (F32, plain.tobytes(), plain),
        "f16": (F16, plain.astype(np.float16).tobytes(), plain.astype(np.float16)),
        "bf16": (BF16, (plain.view(np.uint32) >> 16).astype(np.uint16).tobytes(), None),
    }
    path = tmp_path / "types.gguf"
    path.write_bytes(gguf({"a": 1}, {name: ((1, 32), kind, raw) for name, (kind, raw, _) in cases.items()}))
    file = GgufFile(path)
    for name, (_, _, expected) in cases.items():
        if name == "bf16":
            expected = (plain.view(np.uint32) & 0xFFFF0000).view(np.float32)
        np.testing.assert_array_equal(file.read(name), np.float32(expected)[None], err_msg=name)


def vocabulary() -> tuple[list[str], list[str]]:
    """Three control tokens, the bytes' letters, and two merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Us", "er"], ["U s", "e r"]


@pytest.fixture(scope="module")
def small():
    """A tiny tied SmolLM2: its bytes, and its weights in transformers' order."""
    generator = np.random.default_rng(1)
    tokens, merges = vocabulary()
    shapes = {"embed_tokens": (len(tokens), WIDTH), "norm": (WIDTH,), "layernorm": (WIDTH,)}
    key_value = KV_HEADS * WIDTH // HEADS
    shapes |= {"q_proj": (WIDTH, WIDTH), "k_proj": (key_value, WIDTH), "v_proj": (key_value, WIDTH)}
    shapes |= {"o_proj": (WIDTH, WIDTH), "gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH)}
    shapes |= {"down_proj": (WIDTH, INNER)}
    tensors, weights = {}, {}
    for theirs, ours in decoder_names(LAYERS):
        if ours == "lm_head.weight":
            continue
        shape = next(shape for end, shape in shapes.items() if ours.removesuffix(".weight").endswith(end))
        if len(shape) == 1:
            values = generator.normal(1, 0.1, shape).astype(np.float32)
            tensors[theirs] = (shape, F32, values.tobytes())
        else:
            raw, values = q4_1(generator, shape)
            tensors[theirs] = (shape, Q4_1, raw)
        weights[ours] = values
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.rope.freq_base": 100_000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
    }
    return metadata, tensors, weights


PRESET = """
import dataclasses
from tests.tiny_config import config as tiny
from spacedrive_jax.models.families.smolvlm import SiglipVisionConfig, SmolVLMConfig
vision = SiglipVisionConfig(16, 24, 2, 2, patch_size=8, merge_size=2, image_size=32)
config = dataclasses.replace(
    tiny, model=dataclasses.replace(tiny.model, vlm=dataclasses.replace(SmolVLMConfig(), vision=vision))
)
"""


def test_a_language_model_becomes_the_decoder_of_a_smolvlm(small, tmp_path, capsys):
    metadata, tensors, weights = small
    source, preset, out = tmp_path / "lm.gguf", tmp_path / "preset.py", tmp_path / "weights"
    source.write_bytes(gguf(metadata, tensors))
    preset.write_text(PRESET)
    command = ["import-weights", "--from", "gguf", str(source), "--config", str(preset), "--out", str(out)]
    assert main([*command, "--json"]) == 0
    assert "the tower is fresh" in capsys.readouterr().out
    model = open_model(out)
    decoder, count = model.config.decoder, len(metadata["tokenizer.ggml.tokens"])
    assert isinstance(model, smolvlm.SmolVLM)
    assert (decoder.vocab_size, decoder.norm_eps, decoder.rope_theta) == (count + 6, 1e-5, 1e5)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.tie_word_embeddings) == (HEADS, KV_HEADS, True)
    assert model.config.vision.image_size == 32
    table = np.asarray(model.decoder.embedding[...])
    np.testing.assert_array_equal(table[:count], weights["model.language_model.embed_tokens.weight"])
    np.testing.assert_allclose(table[count:], np.tile(table[:count].mean(0), (6, 1)), atol=1e-7)
    layer = "model.language_model.layers.1."
    blocks = model.decoder.layers
    down = np.asarray(blocks.mlp.down.kernel[...])[1]
    np.testing.assert_array_equal(down.T, weights[f"{layer}mlp.down_proj.weight"])
    keys = np.asarray(blocks.attention.k.kernel[...])[1].reshape(WIDTH, -1).T
    np.testing.assert_array_equal(
        keys, without_rope_order(weights[f"{layer}self_attn.k_proj.weight"], KV_HEADS)
    )
    tokenizer = load_tokenizer(out, smolvlm.FAMILY.chat)
    assert (tokenizer.image, tokenizer.indicator) == (model.config.image_token_id, count + 4)
    ids = tokenizer.encode("<|im_start|>User: 12")
    assert ids[0] == 1
    assert [tokenizer.decode([each]) for each in ids[1:3]] == ["Us", "er"]
    assert tokenizer.decode(ids) == "<|im_start|>User: 12"
    patches, grid = model.process([np.zeros((9, 20, 3), np.uint8)])
    prompt = np.array([[*ids, *[model.config.image_token_id] * 4]])
    assert np.isfinite(model.logits(prompt, pixel_values=patches, image_grid_thw=grid)).all()
    again = tmp_path / "again"
    assert main([*command[:-1], str(again)]) == 0
    read = [json.loads((folder / "weights.json").read_text())["fingerprint"] for folder in (out, again)]
    assert read[0] == read[1]


def test_rows_go_back_to_transformers_order():
    """Two heads of four: llama.cpp's 0 2 1 3 of each."""
    rows = np.array([0, 2, 1, 3, 4, 6, 5, 7])[:, None] * np.ones((8, 3))
    np.testing.assert_array_equal(without_rope_order(rows, 2)[:, 0], np.arange(8))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma', expected 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type is not supported"),
        ({"llama.block_count": 3}, r"missing model\.language_model\.layers\.2\."),
        ({"llama.attention.head_count": "four"}, r"llama\.attention\.head_count is 'four'"),
        ({"llama.attention.head_count": 3}, "must be a multiple of num_kv_heads"),
        ({"tokenizer.ggml.pre": "qwen2"}, r"\('gpt2', 'qwen2'\), this reads \('gpt2', 'smollm'\)"),
    ],
)
def test_other_models_are_refused_by_name(small, tmp_path, capsys, change, problem):
    metadata, tensors, _ = small
    source = tmp_path / "lm.gguf"
    source.write_bytes(gguf(metadata | change, tensors))
    assert main(["import-weights", "--from", "gguf", str(source), "--out", str(tmp_path / "out")]) == 1
    assert re.search(problem, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_scaled_rotary_frequencies_are_refused(small, tmp_path, capsys):
    metadata, tensors, _ = small
    source = tmp_path / "lm.gguf"
    factors = np.ones(WIDTH // HEADS // 2, np.float32)
    factors[-1] = 8
    scaled = {"rope_freqs.weight": (factors.shape, F32, factors.tobytes())}
    source.write_bytes(gguf(metadata, tensors | scaled))
    assert main(["import-weights", "--from", "gguf", str(source), "--out", str(tmp_path / "out")]) == 1
    assert "rope_freqs.weight scales the rotary frequencies" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named(small, tmp_path):
    metadata, tensors, _ = small
    whole = gguf(metadata, tensors)
    path = tmp_path / "lm.gguf"
    wrong_type = gguf(metadata, {"x": ((1, 256), 14, b"\0" * 210)})
    for content, problem in (
        (b"", "cut short"),
        (b"PK" + whole, "is no GGUF file"),
        (whole[:4] + struct.pack("<I", 1) + whole[8:], "version 1"),
        (whole[:200], "cut short"),
        (whole[:-1], "cut short"),
        (whole[:8] + b"\xff" * 16 + whole[24:], "cannot be"),
        (wrong_type, "type Q6_K, this reads F32"),
        (gguf(metadata, {"x": ((3,), Q4_1, b"")}), "which Q4_1 cannot have"),
    ):
        path.write_bytes(content)
        with pytest.raises(SpaceDriveError, match=problem):
            GgufFile(path)

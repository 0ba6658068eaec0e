"""Reading torch's files without torch, and refusing what would have to be run."""

import collections
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from spacedrive_jax.errors import CheckpointError, DataError
from spacedrive_jax.interop.spacedrive_tensors import join_checkpoint, split_checkpoint
from spacedrive_jax.interop.torch_file import read_torch_file, write_torch_file

STATE = {
    "pe_scaling": np.array(0.125, np.float32),
    "position_encoder.pe_scaling": np.array(0.125, np.float32),
    "lm_head.base_model.model.model.layers.0.q_proj.base_layer.weight": np.arange(6, dtype=ml_dtypes.bfloat16)
    .reshape(2, 3)
    .T.copy(),
    "lm_head.base_model.model.model.layers.0.q_proj.lora_A.default.weight": np.ones((2, 3), np.float32),
    "depth_model.blocks.weight": np.arange(4, dtype=np.int64),
    "empty": np.zeros((0, 3), np.float16),
}
CONTENT = {"meta": {"iter": 21096, "seen": 2**40, "best": 0.5, "mmcv_version": "1.7.2"}, "state_dict": STATE}


def test_writing_and_reading_is_bit_exact(tmp_path):
    write_torch_file(tmp_path / "iter_1.pth", CONTENT)
    read = read_torch_file(tmp_path / "iter_1.pth")
    assert read["meta"] == CONTENT["meta"]
    assert list(read["state_dict"]) == list(STATE)
    for name, value in STATE.items():
        found = read["state_dict"][name]
        assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())


def test_splitting_and_joining_loses_nothing():
    parts = split_checkpoint(CONTENT, "test")
    assert list(parts.base) == ["model.layers.0.q_proj.weight"]
    assert list(parts.adapters) == ["base_model.model.model.layers.0.q_proj.lora_A.weight"]
    assert list(parts.depth) == ["blocks.weight"]
    joined = join_checkpoint(parts)["state_dict"]
    assert list(joined) == list(STATE)
    assert all(joined[name] is value for name, value in STATE.items())


def test_copies_of_the_scale_must_agree():
    other = STATE | {"position_encoder.pe_scaling": np.array(0.5, np.float32)}
    with pytest.raises(CheckpointError, match="pe_scaling"):
        split_checkpoint({"state_dict": other}, "test")


class _Command:
    def __reduce__(self):
        return print, ("this must not be printed",)


@pytest.mark.parametrize("value", [_Command(), collections.Counter("ab"), np.array([None])])
def test_anything_but_tensors_is_refused(tmp_path, value, capsys):
    file = tmp_path / "bad.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("bad/data.pkl", pickle.dumps({"state_dict": value}, protocol=2))
    with pytest.raises(DataError, match="only tensors and plain containers"):
        read_torch_file(file)
    assert capsys.readouterr().out == ""


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "iter_1.pth"
    write_torch_file(file, CONTENT)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="is not a whole zip file"):
        read_torch_file(file)
    with pytest.raises(DataError, match="exists"):
        write_torch_file(file, CONTENT)


def test_a_tensor_may_not_leave_its_storage(tmp_path):
    file, wrong = tmp_path / "iter_1.pth", tmp_path / "wrong.pth"
    write_torch_file(file, {"state_dict": {"a": np.zeros(7, np.float32)}})
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(wrong, "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"(J\7\0\0\0t", b"(J\x09\0\0\0t")
            bad.writestr(name, content)
    with pytest.raises(DataError, match="leaves its storage"):
        read_torch_file(wrong)


def rewritten(source, target, program, extra=(), compression=zipfile.ZIP_STORED):
    """The file with another pickle, and more files in it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            is_program = name.endswith("data.pkl")
            content = program(old.read(name)) if is_program else old.read(name)
            new.writestr(name, content, compression if is_program else zipfile.ZIP_STORED)
        for name, content in extra:
            new.writestr(name, content)


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        (b"\x80\x04" + b"N0" * 1000, "compressed"),
        (b"\x80\x02]q\0(h\0h\0e.", "holds itself"),
        (b"\x80\x02" + b"]" * 200 + b"a" * 199 + b".", "deep in each other"),
        (
            b"\x80\x02]q\0" + b"".join(b"](h%ch%ce" % (n, n) + b"q%c" % (n + 1) for n in range(40)) + b".",
            "repeat",
        ),
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "asks for 1099511627776 bytes"),
        (b"\x80\x02ccollections\nOrderedDict\n}X\x01\0\0\0ak\x01b.", "is not a whole"),
    ],
)
def test_small_files_cannot_ask_for_much(tmp_path, program, problem):
    write_torch_file(tmp_path / "good.pth", CONTENT)
    compression = zipfile.ZIP_DEFLATED if problem == "compressed" else zipfile.ZIP_STORED
    rewritten(tmp_path / "good.pth", tmp_path / "bad.pth", lambda _: program, compression=compression)
    with pytest.raises(DataError, match=problem):
        read_torch_file(tmp_path / "bad.pth")


def test_a_tensor_shows_no_more_numbers_than_its_storage_has(tmp_path):
    write_torch_file(tmp_path / "good.pth", {"state_dict": {"a": np.zeros(7, np.float32)}})
    one, many = b"(J\7\0\0\0t(J\1\0\0\0t", b"(J\xff\xff\xff\x7ft(J\0\0\0\0t"

    def expanded(program):
        assert one in program
        return program.replace(one, many)

    rewritten(tmp_path / "good.pth", tmp_path / "bad.pth", expanded)
    with pytest.raises(DataError, match="leaves its storage of 7 numbers"):
        read_torch_file(tmp_path / "bad.pth")


def test_a_flipped_bit_is_seen(tmp_path):
    file = tmp_path / "iter_1.pth"
    write_torch_file(file, {"state_dict": {"a": np.full(64, 1.5, np.float32)}})
    content = bytearray(file.read_bytes())
    content[content.index(np.full(64, 1.5, np.float32).tobytes()) + 17] ^= 4
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"checksum of iter_1/data/0 is another\. Download it again"):
        read_torch_file(file)


def test_numbers_of_numpy_and_parameters_are_read(tmp_path):
    """mmcv's evaluation hook leaves numpy numbers in `meta`, some trainers save nn.Parameter."""
    write_torch_file(tmp_path / "good.pth", {"state_dict": {}})
    number = pickle.dumps({"best": np.float64(0.25), "all": np.arange(3)}, 2)
    rewritten(tmp_path / "good.pth", tmp_path / "numpy.pth", lambda _: number)
    read = read_torch_file(tmp_path / "numpy.pth")
    assert read["best"] == 0.25
    np.testing.assert_array_equal(read["all"], [0, 1, 2])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
        (b"GGUF" + bytes(60), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        ((9).to_bytes(8, "little") + b'{"a":{}} ', "safetensors"),
    ],
)
def test_other_formats_are_named(tmp_path, content, what):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(DataError, match=what):
        read_torch_file(tmp_path / "a.pth")


def test_weights_that_are_no_numbers_are_refused():
    for wrong in (np.nan, np.inf):
        with pytest.raises(CheckpointError, match="pe_scaling holds nan or infinity"):
            split_checkpoint({"state_dict": {"pe_scaling": np.array(wrong, np.float32)}}, "test")

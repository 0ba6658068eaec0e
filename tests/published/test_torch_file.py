"""Reading torch's files without torch, and refusing what would have to be run."""

import collections
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from spacedrive_jax.console import UserError
from spacedrive_jax.published.checkpoint import join_checkpoint, split_checkpoint
from spacedrive_jax.published.torch_file import read_torch_file, write_torch_file

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
    with pytest.raises(UserError, match="pe_scaling"):
        split_checkpoint({"state_dict": other}, "test")


class _Command:
    def __reduce__(self):
        return print, ("this must not be printed",)


@pytest.mark.parametrize("value", [_Command(), np.float32(1), collections.Counter("ab")])
def test_anything_but_tensors_is_refused(tmp_path, value, capsys):
    file = tmp_path / "bad.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("bad/data.pkl", pickle.dumps({"state_dict": value}, protocol=2))
    with pytest.raises(UserError, match="only tensors and plain containers"):
        read_torch_file(file)
    assert capsys.readouterr().out == ""


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "iter_1.pth"
    write_torch_file(file, CONTENT)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a zip file"):
        read_torch_file(file)
    with pytest.raises(UserError, match="exists"):
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
    with pytest.raises(UserError, match="leaves its storage"):
        read_torch_file(wrong)

"""Damaged and hostile safetensors headers: one sentence each, no byte from outside the file."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence import assert_one_sentence
from tiny import write_json

from torch_q4metal.checkpoint import Checkpoint
from torch_q4metal.errors import CheckpointError
from torch_q4metal.safetensors_header import read_header

A = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
B = {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]}
DATA = bytes(range(64))


def file_bytes(header, data=DATA, length=None):
    """A safetensors file of ``header`` (object or bytes), which claims to have ``length`` bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def write(path, content):
    write_json(path / "config.json", {"model_type": "llama"})
    file = path / "model.safetensors"
    file.write_bytes(content)
    return file


def test_right_header(tmp_path):
    infos = read_header(
        write(tmp_path, file_bytes({"b": B, "a": A, "__metadata__": {"format": "mlx"}}))
    )
    assert list(infos) == ["a", "b"]  # by position
    assert infos["a"].shape == (2, 4)
    assert infos["b"].dtype == torch.bfloat16
    assert infos["b"].nbytes == 32
    assert Checkpoint.open(tmp_path).tensor("a").numpy().tobytes() == DATA[:32]


def test_padding_between_tensors_is_allowed(tmp_path):
    later = B | {"data_offsets": [4096, 4128]}
    content = file_bytes({"a": A, "b": later}, DATA[:32] + bytes(4064) + DATA[32:])
    assert read_header(write(tmp_path, content))["b"].nbytes == 32


def changed(**entry):
    return file_bytes({"a": A | entry, "b": B})


GOOD = {"a": A, "b": B}
RAW = json.dumps(GOOD).encode()
FAULTS = {
    "empty file": (b"", ["0 bytes"]),
    "shorter than the length": (b"\x01\x02\x03", ["3 bytes"]),
    "truncated data": (file_bytes(GOOD, DATA[:-1]), ["tensor b", "truncated"]),
    "truncated header": (file_bytes(GOOD)[:40], ["truncated"]),
    "endless header": (file_bytes(GOOD, length=2**64 - 1), ["18446744073709551615 bytes"]),
    "header longer than the file": (file_bytes(GOOD, length=10_000), ["10000 bytes"]),
    "length too small": (file_bytes(GOOD, length=len(RAW) - 3), ["damaged header"]),
    "length too large": (file_bytes(GOOD, length=len(RAW) + 3), ["damaged header"]),
    "length too small by a space": (file_bytes(RAW + b" ", length=len(RAW)), ["damaged"]),
    "length 0": (file_bytes(GOOD, length=0), ["damaged header"]),
    "no JSON": (file_bytes(b"<html>not found</html>"), ["damaged header"]),
    "no text": (file_bytes(b'{"\xff": 1}'), ["damaged header"]),
    "a list": (file_bytes(b"[]"), ["not a JSON object"]),
    "nested too deeply": (file_bytes(b'{"a":' + b"[" * 200_000), ["nested too deeply"]),
    "a number of many digits": (file_bytes(b'{"a":' + b"9" * 9_000 + b"}"), ["damaged header"]),
    "one name twice": (file_bytes(b'{"a": 1, "a": 2}'), ["a appears twice"]),
    "no tensors but data": (file_bytes({}), ["accounts for"]),
    "bytes after the last tensor": (file_bytes(GOOD, DATA + b"x"), ["accounts for"]),
    "a large hole": (
        file_bytes({"b": B | {"data_offsets": [70_000, 70_032]}}, bytes(70_032)),
        ["before tensor b", "belong to no tensor"],
    ),
    "entry is no object": (file_bytes({"a": 1, "b": B}), ["tensor a", "damaged header entry"]),
    "unknown dtype": (changed(dtype="F12"), ["tensor a", "'F12'"]),
    "dtype is a list": (changed(dtype=["F32"]), ["tensor a", "dtype"]),
    "dtype of another size": (
        changed(dtype="F16"),
        ["tensor a", "32 bytes", "F16 [2, 4] needs 16"],
    ),
    "shape of another size": (changed(shape=[2, 5]), ["tensor a", "32 bytes", "needs 40"]),
    "negative size": (changed(shape=[-2, -4]), ["tensor a", "[-2, -4]"]),
    "size is a boolean": (changed(shape=[True, 8]), ["tensor a", "shape"]),
    "size is a fraction": (changed(shape=[2.0, 4]), ["tensor a", "shape"]),
    "enormous size": (changed(shape=[2**62, 2**62, 0]), ["tensor a", "32 bytes", "needs 0"]),
    "product beyond 64 bits": (changed(shape=[2**62] * 3), ["tensor a", "32 bytes"]),
    "size beyond 64 bits": (changed(shape=[2**80, 0]), ["tensor a", "shape"]),
    "hundreds of dimensions": (changed(shape=[1] * 500), ["tensor a", "shape"]),
    "shape is missing": (
        file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 0]}}, b""),
        ["tensor a"],
    ),
    "offsets are missing": (file_bytes({"a": {"dtype": "F32", "shape": [0]}}, b""), ["tensor a"]),
    "offsets run backwards": (changed(data_offsets=[32, 0]), ["tensor a", "[32, 0]"]),
    "negative offset": (changed(data_offsets=[-32, 0]), ["tensor a", "[-32, 0]"]),
    "three offsets": (changed(data_offsets=[0, 16, 32]), ["tensor a", "data_offsets"]),
    "offsets outside the file": (changed(data_offsets=[64, 96]), ["tensor a", "ends at byte"]),
    "offsets far outside": (
        changed(data_offsets=[2**62, 2**62 + 32]),
        ["tensor a", "ends at byte"],
    ),
    "overlapping": (changed(data_offsets=[16, 48]), ["tensor b", "inside the tensor before it"]),
    "same bytes twice": (changed(data_offsets=[32, 64]), ["inside the tensor before it"]),
    "control characters in a name": (
        file_bytes({"a\n\x1b[31m": {"dtype": "F12"}}),
        [r"a\n\x1b[31m"],
    ),
    "half a surrogate in a name": (file_bytes(rb'{"\ud800": {"dtype": "F12"}}'), [r"\ud800"]),
    "a name of a million letters": (file_bytes({"a" * 10**6: {}}), ["aaa..."]),
}


@pytest.mark.parametrize(("content", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_fault_is_named_in_one_sentence(tmp_path, content, words):
    write(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert_one_sentence(caught.value, "model.safetensors", *words)
    assert len(str(caught.value)) < 600


def test_unreadable_file(tmp_path):
    write(tmp_path, b"").unlink()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "model.safetensors")
    assert_one_sentence(caught.value, "model.safetensors", "cannot be read")


def open_and_read_all(path, content):
    """Whatever a file holds: it is refused in a sentence, or every tensor is exactly its bytes."""
    write(path, content)
    message = "Read."
    try:
        checkpoint = Checkpoint.open(path)
    except CheckpointError as error:
        message = str(error)
    else:
        for name, info in checkpoint.tensors.items():
            assert 0 <= info.begin <= info.end <= len(content)
            tensor = checkpoint.tensor(name)
            assert tensor.nbytes == info.nbytes
            raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
            assert bytes(raw.tolist()) == content[info.begin : info.end]
    assert_one_sentence(message)


@st.composite
def damaged_bytes(draw):
    content = bytearray(file_bytes(GOOD))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1))
        content[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
        content = content or bytearray(b"\0")
    return bytes(content)


small = st.integers(-2, 70) | st.integers(2**31 - 2, 2**31 + 2) | st.integers(2**63 - 2, 2**64 + 2)
numbers = small | st.booleans() | st.floats() | st.none()
some_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "U32", "I64", "BOOL", "F4", "", None, 3]),
        "shape": st.lists(numbers, max_size=4) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | numbers,
    },
)
# Entries that fit their own bytes, so that the checks of position and overlap are reached.
fitting_entries = st.builds(
    lambda begin, size: {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]},
    begin=st.integers(0, 64),
    size=st.integers(0, 32),
)
headers = st.dictionaries(
    st.sampled_from("abcd"), some_entries | fitting_entries | st.just(A) | st.just(B), max_size=4
)


@settings(max_examples=200)
@given(content=damaged_bytes())
def test_random_damage(tmp_path_factory, content):
    open_and_read_all(tmp_path_factory.mktemp("damaged"), content)


@settings(max_examples=200)
@given(header=headers, size=st.integers(0, 80), shift=st.sampled_from([0, 0, 0, -1, 1, 2**40]))
def test_random_headers(tmp_path_factory, header, size, shift):
    raw = json.dumps(header).encode()
    content = file_bytes(raw, bytes(range(size)), length=max(0, len(raw) + shift))
    open_and_read_all(tmp_path_factory.mktemp("header"), content)

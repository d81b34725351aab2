"""Tokenizers of both kinds (byte-level BPE, SentencePiece), streaming, and damaged files."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence import assert_one_sentence
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from torch_q4metal.errors import TokenizerError
from torch_q4metal.tokenizer import Tokenizer

TEXTS = ["Hello, world!", "  two  spaces\n\tand tabs ", "世界 🙂 e\u0301 Zürich", "👩‍👩‍👧 नमस्ते", ""]
CHAT = [{"role": "user", "content": "Hello 🙂"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def byte_level() -> Backend:
    """As in Llama 3 and Qwen: bytes written as letters, merged; special tokens at the end."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3 + ["Hello world, hello there"], trainer)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<think>"])
    return backend


def sentencepiece() -> Backend:
    """As in Llama 2 and Mistral: a mark for spaces, one in front, and tokens for unknown bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁Helo,wrd!astp", "▁H", "lo", "llo", "ello", "▁Hello", "▁w", "or", "ld", "▁▁"]
    merges = [("▁", "H"), ("l", "o"), ("l", "lo"), ("e", "llo"), ("▁H", "ello"), ("▁", "w")]
    merges += [("o", "r"), ("l", "d"), ("▁", "▁")]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return backend


KINDS: dict[str, Callable[[], Backend]] = {"bytes": byte_level, "sentencepiece": sentencepiece}
BUILT = {name: Tokenizer(build()) for name, build in KINDS.items()}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(backend: Backend | None = None, **files: Any) -> Path:
        (backend or byte_level()).save(str(tmp_path / "tokenizer.json"))
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        return tmp_path

    return write


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


@kinds
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(kind, text):
    tokenizer = BUILT[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in text + "".join(pieces)


@kinds
def test_a_split_character_is_held_back(kind):
    tokenizer = BUILT[kind]
    ids = tokenizer.encode("𐍈", add_special_tokens=False)
    assert len(ids) >= 4
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.add(token) for token in ids] == [""] * (len(ids) - 1) + ["𐍈"]
    assert detokenizer.finish() == ""


@kinds
def test_the_end_shows_what_was_held_back(kind):
    tokenizer = BUILT[kind]
    ids = tokenizer.encode("a𐍈", add_special_tokens=False)[:-1]
    pieces = stream(tokenizer, ids)
    assert pieces[-1] == "\N{REPLACEMENT CHARACTER}" * len(pieces[-1]) != ""
    assert "".join(pieces) == tokenizer.decode(ids)


@kinds
def test_special_tokens_are_left_out(kind):
    tokenizer = BUILT[kind]
    ids = tokenizer.encode("Hello<s></s>", add_special_tokens=False)
    special = [tokenizer.backend.token_to_id(token) for token in ("<s>", "</s>")]
    assert ids[-2:] == special
    assert "".join(stream(tokenizer, [*special, *ids])) == "Hello"
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("<s></s>")


def test_tokens_that_are_added_but_not_special_are_text():
    tokenizer = BUILT["bytes"]
    ids = tokenizer.encode("<think>a")
    assert len(ids) == 2
    assert "".join(stream(tokenizer, ids)) == "<think>a"


def test_sentencepiece_spaces():
    tokenizer = BUILT["sentencepiece"]
    ids = tokenizer.encode("Hello world")
    assert stream(tokenizer, ids)[:2] == ["", "Hello"]  # not " Hello"
    assert "".join(stream(tokenizer, ids)) == "Hello world"


@given(st.lists(st.integers(0, 323), max_size=12))
def test_any_ids_stream_as_they_decode(ids):
    tokenizer = BUILT["bytes"]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.text(max_size=12), st.text(alphabet="▁ Hello🙂é", max_size=12))
def test_any_text_streams_as_it_decodes(text, more):
    tokenizer = BUILT["sentencepiece"]
    ids = tokenizer.encode(text) + tokenizer.encode(more)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 300), max_size=12))
def test_broken_bytes_raise_nothing(ids):
    """One broken byte spoils its run of byte tokens, also what was shown of it."""
    tokenizer = BUILT["sentencepiece"]
    pieces = stream(tokenizer, ids)
    broken = "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(ids)
    assert broken or "".join(pieces) == tokenizer.decode(ids)
    # Afterwards text goes on as it should.
    detokenizer = tokenizer.detokenizer()
    for token in [*ids, *tokenizer.encode("! Hello", add_special_tokens=False)]:
        last = detokenizer.add(token)
    assert last == " Hello"


def test_ids_without_a_token_are_left_out():
    tokenizer = BUILT["bytes"]
    ids = tokenizer.encode("Hello")
    assert "".join(stream(tokenizer, [*ids, 100_000, *ids])) == "HelloHello"


@kinds
def test_same_ids_as_transformers(kind, write):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    config = names | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    folder = write(KINDS[kind](), tokenizer_config=config)
    ours, theirs = Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == plain
    wanted = theirs.apply_chat_template(CHAT, return_dict=False)
    assert ours.encode_chat(CHAT) == wanted
    bos = ours.backend.token_to_id("<s>")
    assert wanted.count(bos) == 1  # the template's, and no second one


def test_names_from_the_config(write):
    folder = write(
        tokenizer_config={"bos_token": None, "eos_token": {"content": "</s>", "lstrip": False}},
        special_tokens_map={"bos_token": "<s>", "eos_token": "<s>", "pad_token": {"content": "p"}},
    )
    tokenizer = Tokenizer.from_dir(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.eos_token_ids == {tokenizer.backend.token_to_id("</s>")}
    assert tokenizer.special_tokens["pad_token"] == "p"
    assert "</s>" in repr(tokenizer)


def test_no_config_is_fine(write):
    tokenizer = Tokenizer.from_dir(write())
    assert tokenizer.eos_token is None
    assert tokenizer.eos_token_ids == frozenset()
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError) as caught:
        tokenizer.render_chat(CHAT)
    assert_one_sentence(caught.value, "no chat template", "--chat-template")


def test_bos_as_the_config_says(write):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer.from_dir(write(tokenizer_config=names | {"add_bos_token": True}))
    bos = tokenizer.backend.token_to_id("<s>")
    assert tokenizer.encode("a")[0] == bos
    assert tokenizer.encode("<s>a").count(bos) == 1
    assert bos not in tokenizer.encode("a", add_special_tokens=False)
    spm = write(sentencepiece(), tokenizer_config=names | {"add_bos_token": False})
    assert 1 not in Tokenizer.from_dir(spm).encode("a")
    assert Tokenizer.from_dir(spm).encode("<s>a")[0] == 1


def test_nothing_is_cut_or_padded(write):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_dir(write(backend))
    assert len(tokenizer.encode("xyz" * 20)) > 8
    assert len(tokenizer.encode("x")) == 1


def test_tokens_that_only_the_config_lists(write, caplog):
    size = byte_level().get_vocab_size()
    listed = {
        str(size): {"content": "<tool>", "special": False},
        str(size + 1): {"content": "<|end|>", "special": True},
        str(size - 1): {"content": "<think>", "special": True},
        "99999": {"content": "<far>", "special": True},
    }
    folder = write(tokenizer_config={"added_tokens_decoder": listed, "eos_token": "<|end|>"})
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.encode("<tool><|end|>") == [size, size + 1]
    assert tokenizer.eos_token_ids == {size + 1}
    assert "".join(stream(tokenizer, [size, size + 1])) == "<tool>"
    assert "".join(stream(tokenizer, [size - 1])) == ""  # <think>, marked special by the config
    assert tokenizer.backend.token_to_id("<far>") is None
    assert "<far>" in caplog.text


def test_a_given_template_comes_first(write):
    folder = write(tokenizer_config={"chat_template": "{{ 1 }}"})
    assert Tokenizer.from_dir(folder).render_chat(CHAT) == "1"
    tokenizer = Tokenizer.from_dir(folder, chat_template="{{ messages[0].content }}{{ x }}")
    assert tokenizer.render_chat(CHAT, x="!") == "Hello 🙂!"
    broken = Tokenizer.from_dir(folder, chat_template="{% if %}")
    with pytest.raises(TokenizerError) as caught:
        broken.render_chat(CHAT)
    assert_one_sentence(caught.value, "The given chat template", "line 1")


def test_tools_choose_their_template(write):
    listed = [
        {"name": "default", "template": "{{ tools is none }}"},
        {"name": "tool_use", "template": "{{ tools[0].name }}"},
    ]
    tokenizer = Tokenizer.from_dir(write(tokenizer_config={"chat_template": listed}))
    assert tokenizer.render_chat(CHAT) == "True"
    assert tokenizer.render_chat(CHAT, tools=[{"name": "weather"}]) == "weather"


def test_text_that_is_no_unicode():
    pasted = b"na\xefve".decode("utf-8", "surrogateescape")
    assert BUILT["bytes"].decode(BUILT["bytes"].encode(pasted)) == "na?ve"


def test_pickle():
    tokenizer = pickle.loads(pickle.dumps(BUILT["bytes"]))
    assert tokenizer.encode("Hello") == BUILT["bytes"].encode("Hello")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[1, 2"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Unheard"}}'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff\xfe\x00"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 3}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [3]}'),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("special_tokens_map.json", b"nothing"),
    ],
)
def test_a_damaged_file_is_named(write, name, content):
    folder = write(tokenizer_config={})
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_dir(folder)
    assert_one_sentence(caught.value, str(folder / name))


def test_every_cut_of_tokenizer_json_is_an_error(write):
    folder = write()
    path = folder / "tokenizer.json"
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, len(whole) // 40):
        path.write_bytes(whole[:size])
        with pytest.raises(TokenizerError) as caught:
            Tokenizer.from_dir(folder)
        assert_one_sentence(caught.value, str(path))


@pytest.mark.parametrize("other", ["tokenizer.model", "qwen.tiktoken", "vocab.json", None])
def test_no_tokenizer_json(tmp_path, other):
    if other:
        (tmp_path / other).write_bytes(b"")
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_dir(tmp_path)
    assert_one_sentence(caught.value, str(tmp_path), "no tokenizer.json", other or "repository")

"""The tokenizer that comes out of a GGUF file, against the algorithms that its metadata names.

Byte-level BPE is compared with a plain implementation below: cut out special tokens, cut the rest
by llama.cpp's expressions one after the other, then merge by rank. SentencePiece is compared with
the library of that name.
"""

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
from gguf_models import byte_symbols, smollm2, write_gguf
from tokenizers import Tokenizer

from torch_q4metal.gguf_file import GgufFile
from torch_q4metal.gguf_tokenizer import write_tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPRESSIONS = {
    "smollm": [r"\p{N}", GPT2],
    "gpt-2": [GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [LLAMA3.replace("{1,3}", "")],
}
TEXTS = [
    "",
    " ",
    "Hello world",
    "hello  world   and\tmore\n\n\nlines \n end ",
    "  leading and trailing  ",
    "1234567890 3.14159 1,000,000 ½ ² ٣ 第12回",
    "I'm we'll THEY'RE don't can'T o'clock 'tis",
    "🙂 👩‍👩‍👧 世界 naïve Ωμέγα привет مرحبا",
    "def f(x):\n    return x**2  # comment\r\n\tdone",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><|endoftext|>x<|im_start",
    "a<tool>b <tool> c",
    "\u200b\u00a0\u3000 x\u0301 \ufeff\x00\x07",
    "....!!!???---___===",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "hellohello hello12 12345 123",
]


def byte_level_ids(text: str, metadata: dict[str, Any], *, whole_words: bool = False) -> list[int]:
    """The ids of ``text``, the long way round; ``whole_words`` as Llama 3 wants it."""
    tokens = {token: i for i, token in enumerate(metadata["tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["merges"])}
    special = [
        t
        for t, kind in zip(metadata["tokens"], metadata["token_type"], strict=True)
        if kind in (3, 4)
    ]
    symbols = byte_symbols()
    ids: list[int] = []
    for piece in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if piece in special:
            ids.append(tokens[piece])
            continue
        words = [piece]
        for expression in EXPRESSIONS[metadata["pre"]]:
            words = [part for word in words for part in _cut(expression, word)]
        for word in words:
            parts = [symbols[byte] for byte in word.encode()]
            if whole_words and "".join(parts) in tokens:
                parts = ["".join(parts)]
            while len(parts) > 1:
                pairs = list(pairwise(parts))
                best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                if best not in ranks:
                    break
                at = pairs.index(best)
                parts[at : at + 2] = ["".join(best)]
            ids += [tokens[part] for part in parts]
    return ids


def _cut(expression: str, text: str) -> list[str]:
    """Matches of ``expression`` and what lies between them."""
    parts, end = [], 0
    for match in regex.finditer(expression, text):
        parts += [text[end : match.start()], match.group()]
        end = match.end()
    return [part for part in [*parts, text[end:]] if part]


def converted(path: Path | GgufFile, folder: Path) -> Tokenizer:
    folder.mkdir()
    write_tokenizer(path if isinstance(path, GgufFile) else GgufFile(path), folder, 512)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def ggml(file: GgufFile) -> dict[str, Any]:
    return {
        key: file.value(f"tokenizer.ggml.{key}")
        for key in ("tokens", "merges", "token_type", "pre")
    }


def test_smollm2(tmp_path: Path) -> None:
    file = smollm2().file
    tokenizer = converted(file, tmp_path / "out")
    metadata = ggml(file)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == byte_level_ids(text, metadata), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    # Digits are single tokens, special tokens one id each, as the model was trained.
    assert len(tokenizer.encode("1234567890").ids) == 10
    assert tokenizer.encode("<|im_start|>system\n").ids == [1, 9690, 198]
    assert tokenizer.decode([1, 9690, 198]) == "system\n"


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_split_rules(tmp_path: Path, pre: str) -> None:
    words = {"tokenizer.ggml.pre": pre} | _vocabulary()
    file = GgufFile(write_gguf(tmp_path / "a.gguf", metadata=words).path)
    tokenizer = converted(file, tmp_path / "out")
    metadata = ggml(file)
    add_bos = pre == "llama-bpe"  # where the file does not say
    different = set()
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        expected = byte_level_ids(text, metadata, whole_words=pre == "llama-bpe")
        assert ids == [1] * add_bos + expected, text
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected
        different.add(expected == byte_level_ids(text, metadata | {"pre": "gpt-2"}))
    assert different == (
        {True} if pre == "gpt-2" else {True, False}
    )  # the texts tell the rules apart


def _vocabulary() -> dict[str, Any]:
    """Merges across the borders between digits, and between apostrophes, letters and line ends."""
    merges = [
        "h e",
        "l l",
        "he ll",
        "hell o",
        "1 2",
        "3 4",
        "12 34",
        "5 6",
        "' t",
        "' T",
        "Ġ h",
        "Ġ 1",
    ]
    merges += [
        "! !",
        "? Ċ",
        "Ċ Ċ",
        "Ġ Ġ",
        ". .",
        "d o",
        "i s",
        "a a",
        "aa aa",
        "12 3",
        "= =",
        "c a",
        "( x",
    ]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    # "Ġworld" is reached by no merge: only Llama 3 takes such a word as it is.
    tokens = special + byte_symbols() + [merge.replace(" ", "") for merge in merges] + ["Ġworld"]
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * (len(tokens) - 4),
        "tokenizer.ggml.merges": merges,
    }


def test_normal_form_of_qwen2(tmp_path: Path) -> None:
    """Qwen2 composes accents first."""
    tokenizer = converted(write_gguf(tmp_path / "a.gguf", "qwen2").path, tmp_path / "out")
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


@pytest.mark.parametrize("add_eos", [True, False])
@pytest.mark.parametrize("add_bos", [True, False])
def test_begin_and_end(tmp_path: Path, add_bos: bool, add_eos: bool) -> None:
    changes = {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}
    tokenizer = converted(write_gguf(tmp_path / "a.gguf", metadata=changes).path, tmp_path / "out")
    plain = tokenizer.encode("hello", add_special_tokens=False).ids
    assert tokenizer.encode("hello").ids == [1] * add_bos + plain + [2] * add_eos
    one = [1] * add_bos + plain + [2] * add_eos
    assert tokenizer.encode("hello", "hello").ids == one + one
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is add_bos
    assert settings["bos_token"] == "<|im_start|>"
    assert settings["model_max_length"] == 512


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    corpus = [line for line in [*TEXTS, *Path(__file__).read_text().splitlines()] if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=700,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefix, character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(oracle.get_piece_size())
    kinds = [
        2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1
        for i in ids
    ]
    assert set(kinds) == {1, 2, 3, 6}
    changes = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [oracle.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [oracle.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    tokenizer = converted(write_gguf(tmp_path / "a.gguf", metadata=changes).path, tmp_path / "out")
    for text in TEXTS:
        text = text.replace("\0", "")  # sentencepiece itself stops there
        found = tokenizer.encode(text).ids
        assert found == [1, *oracle.encode(text)], text  # BOS unless the file says otherwise
        assert tokenizer.decode(found) == text, text

"""The tokenizer in a GGUF file as ``tokenizer.json``, ``tokenizer_config.json``, chat template.

GGUF names the split rule of a byte-level BPE (``tokenizer.ggml.pre``) without spelling it out; the
rules known here are those of the families that are converted. A SentencePiece vocabulary
(``tokenizer.ggml.model = llama``) keeps scores in place of merges; the merges follow from them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from .errors import TokenizerError
from .gguf_file import GgufFile, printable

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
_SPACE = "\u2581"  # SentencePiece writes a blank as this character

# Words take one leading character that is no letter, digit or line end; line ends stay with the
# blanks before them. Llama 3 cuts numbers into groups of three digits, Qwen2 into single digits.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes_after(*splits: Any) -> Any:
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _gpt2_split(*before: Any) -> Any:
    return pre_tokenizers.Sequence(
        [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def _word_split(number: str) -> Any:
    pattern = Regex(_WORDS.format(number=number))
    return _bytes_after(pre_tokenizers.Split(pattern, "isolated", invert=False))


@dataclass(frozen=True)
class _SplitRule:
    split: Callable[[], Any]
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False  # where the file does not say


_LLAMA3 = _SplitRule(lambda: _word_split(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_QWEN2 = _SplitRule(lambda: _word_split(r"\p{N}"), nfc=True)
SPLIT_RULES = {
    "gpt-2": _SplitRule(_gpt2_split),
    "smollm": _SplitRule(lambda: _gpt2_split(pre_tokenizers.Digits(individual_digits=True))),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def write_tokenizer(file: GgufFile, folder: Path, context_length: int) -> None:
    """Write the tokenizer files of ``file`` into ``folder``.

    Raises TokenizerError naming what is missing or not built.
    """
    tokens = _strings(file, "tokenizer.ggml.tokens")
    kinds = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(set(tokens)) != len(tokens) or len(kinds) != len(tokens):
        raise TokenizerError(f"{file.path}: the token list has duplicates or too few types.")
    special = _special_tokens(file, tokens)
    model = file.get("tokenizer.ggml.model", str)
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(file, tokens)
    elif model == "llama":
        tokenizer, add_bos = _sentencepiece(file, tokens, special.get("unk_token")), True
    else:
        raise TokenizerError(
            f"{file.path}: the tokenizer model {printable(model)} is not built: gpt2 and llama are."
        )
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(text, special=False, normalized=False)
            for text, kind in zip(tokens, kinds, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    add_bos = file.get("tokenizer.ggml.add_bos_token", bool, add_bos)
    add_eos = file.get("tokenizer.ggml.add_eos_token", bool, False)
    _add_template(tokenizer, special, add_bos, add_eos)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        **special,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_templates(file, folder)


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """A byte-level BPE, and whether its texts begin with BOS unless the file says otherwise."""
    name = file.get("tokenizer.ggml.pre", str, "default")
    rule = SPLIT_RULES.get(name)
    if rule is None:
        known = ", ".join(SPLIT_RULES)
        raise TokenizerError(
            f"{file.path}: the pre-tokenizer {printable(name)} is not built: known are {known}."
        )
    merges = [tuple(pair.split(" ")) for pair in _strings(file, "tokenizer.ggml.merges")]
    model = _bpe(file, tokens, merges, ignore_merges=rule.ignore_merges)
    tokenizer = Tokenizer(model)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.add_bos


def _sentencepiece(file: GgufFile, tokens: list[str], unknown: str | None) -> Tokenizer:
    """SentencePiece BPE: blanks are visible characters, unknown characters fall back to bytes."""
    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise TokenizerError(f"{file.path}: {len(scores)} token scores for {len(tokens)} tokens.")
    merges = _merges_from_scores(tokens, scores)
    tokenizer = Tokenizer(
        _bpe(file, tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to build a token from two others, best score first: SentencePiece's merge order."""
    ids = {text: index for index, text in enumerate(tokens)}
    ranked = []
    for text, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _bpe(file: GgufFile, tokens: list[str], merges: list[Any], **options: Any) -> models.BPE:
    vocab = {text: index for index, text in enumerate(tokens)}
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # tokenizers raises plain Exception, also for a merge of no token
        raise TokenizerError(
            f"{file.path}: tokens and merges do not fit: {printable(error)}."
        ) from error


def _special_tokens(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    special = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = file.find(f"tokenizer.ggml.{key}_token_id", int)
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise TokenizerError(
                f"{file.path}: the {name} token {index} is outside the {len(tokens)} tokens."
            )
        special[f"{name}_token"] = tokens[index]
    return special


def _add_template(
    tokenizer: Tokenizer, special: dict[str, str], add_bos: bool, add_eos: bool
) -> None:
    bos = special.get("bos_token") if add_bos else None
    eos = special.get("eos_token") if add_eos else None
    if bos is None and eos is None:
        return
    used = [text for text in (bos, eos) if text is not None]
    first, second = ([text for text in (bos, body, eos) if text] for body in ("$A:0", "$B:1"))
    tokenizer.post_processor = TemplateProcessing(
        single=first,
        pair=[*first, *(text if text == "$B:1" else f"{text}:1" for text in second)],
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in dict.fromkeys(used)],
    )


def _write_templates(file: GgufFile, folder: Path) -> None:
    """``chat_template.jinja``, and further templates under ``additional_chat_templates``."""
    template = file.find("tokenizer.chat_template", str)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in file.get("tokenizer.chat_templates", list, []):
        text = file.find(f"tokenizer.chat_template.{name}", str)
        if text is None or not str(name).replace("_", "").isalnum():
            continue  # a name becomes a file name: take no other characters from strangers
        extra = folder / "additional_chat_templates"
        extra.mkdir(exist_ok=True)
        (extra / f"{name}.jinja").write_text(text, encoding="utf-8")


def _strings(file: GgufFile, key: str) -> list[str]:
    values = file.value(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TokenizerError(
            f"{file.path} has no {key}: it carries no tokenizer that can be converted."
        )
    return values


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

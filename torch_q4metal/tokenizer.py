"""Text to token ids and back, as a checkpoint's tokenizer.json says.

``Tokenizer`` wraps the ``tokenizers`` library and adds what lies around it: the beginning and end
tokens of tokenizer_config.json, the chat template, and text that appears token by token
(``Detokenizer``). It knows nothing about models and imports no torch.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from .chat_template import DEFAULT, ChatTemplate, choose_template, find_templates
from .errors import TokenizerError

logger = logging.getLogger(__name__)

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A checkpoint's tokenizer; ``Tokenizer.from_dir`` reads one.

    ``bos_token`` and ``eos_token`` are texts or None; ``eos_token_ids`` are the ids of the
    tokenizer's own end token (config.json and generation_config.json may name more).
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        templates: Mapping[str, ChatTemplate] | None = None,
        *,
        add_bos_token: bool | None = None,
        name: str = "The model",
    ) -> None:
        # Files made for training may cut every text at 512 tokens, or pad it to that.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.templates = dict(templates or {})
        self._add_bos, self._name = add_bos_token, name
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        eos = None if self.eos_token is None else backend.token_to_id(self.eos_token)
        self.eos_token_ids: frozenset[int] = frozenset(() if eos is None else (eos,))

    @classmethod
    def from_dir(cls, path: str | Path, chat_template: str | None = None) -> "Tokenizer":
        """Read the tokenizer files of a checkpoint; ``chat_template`` is a text to use for its own.

        Raises TokenizerError naming the file that is missing or damaged.
        """
        directory = Path(path)
        config = _read_json(directory / "tokenizer_config.json")
        backend = _read_backend(directory)
        _add_tokens(backend, config, directory)
        if chat_template is None:
            templates = find_templates(directory, config)
        else:
            templates = {DEFAULT: ChatTemplate(chat_template, "The given chat template")}
        add_bos = config.get("add_bos_token")
        return cls(
            backend,
            _named_tokens(_read_json(directory / "special_tokens_map.json"))
            | _named_tokens(config),
            templates,
            add_bos_token=add_bos if isinstance(add_bos, bool) else None,
            name=str(directory),
        )

    def __repr__(self) -> str:
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, bos_token={self.bos_token!r}, "
            f"eos_token={self.eos_token!r}, chat_template={self.has_chat_template})"
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, with the added ones; a model's table may have more rows."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return bool(self.templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in it become their ids.

        ``add_special_tokens`` puts in front what the tokenizer wants there (Llama: its bos token).
        """
        # A terminal passes bytes that are no UTF-8 on as lone surrogates, which can't be encoded.
        clean = text.encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = self.backend.encode(clean, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self.bos_token is not None and self._add_bos is not None:
            bos = self.backend.token_to_id(self.bos_token)
            if bos is not None and self._add_bos and ids[:1] != [bos]:
                return [bos, *ids]
            if not self._add_bos and ids[:1] == [bos] and not clean.startswith(self.bos_token):
                return ids[1:]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; ids that no token has are left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self) -> "Detokenizer":
        """A new Detokenizer, for one answer."""
        return Detokenizer(self.backend)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text for ``messages``, dicts with "role" and "content".

        ``variables`` go to the template as they are (``enable_thinking=False``, ``documents``).
        Raises TokenizerError: no chat template, or one that refuses, fails or takes too much.
        """
        if not self.templates:
            raise TokenizerError(
                f"{self._name} has no chat template: give one with --chat-template, "
                "or a plain prompt with --ignore-chat-template."
            )
        template = choose_template(self.templates, tools=bool(tools))
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools or None,
            **(self.special_tokens | variables),
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of ``render_chat``: the template writes the special tokens, none is added."""
        text = self.render_chat(messages, add_generation_prompt, tools, **variables)
        return self.encode(text, add_special_tokens=False)


class Detokenizer:
    """The text of one answer, token by token. Special tokens are left out.

    ``add`` returns what is certain: it holds back a character whose bytes have not all come. All
    that it returned, and then ``finish``, make up ``decode`` of the ids. (With SentencePiece
    vocabularies one broken byte spoils its whole run of byte tokens, also those already shown;
    then the rest is what ``decode`` has beyond as many characters as were shown.)
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token_id: int) -> str:
        """The text that ``token_id`` completes, often empty."""
        self._ids.append(token_id)
        try:
            piece = self._stream.step(self._backend, token_id) or ""
        except Exception:  # "Invalid prefix": text already shown changed. Go on from here.
            piece = self._rest().rstrip(_REPLACEMENT)
            self._stream = DecodeStream(ids=[token_id], skip_special_tokens=True)
        self._shown += len(piece)
        return piece

    def finish(self) -> str:
        """What was held back: the answer ends here."""
        piece = self._rest()
        self._shown += len(piece)
        return piece

    def _rest(self) -> str:
        return str(self._backend.decode(self._ids, skip_special_tokens=True))[self._shown :]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``, or {} where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} can't be read ({error}): download it again.") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds no JSON object: download it again.")
    return value


def _read_backend(directory: Path) -> Backend:
    path = directory / "tokenizer.json"
    if not path.is_file():
        others = [
            name
            for pattern in ("tokenizer.model", "*.tiktoken", "vocab.json")
            for name in sorted(found.name for found in directory.glob(pattern))
        ]
        instead = f", only {others[0]}" if others else ""
        raise TokenizerError(
            f"{directory} has no tokenizer.json{instead}: take it from the original model's "
            "repository, or write it with AutoTokenizer.from_pretrained(...).save_pretrained(...) "
            "of transformers."
        )
    try:
        return Backend.from_file(str(path))
    except BaseException as error:
        # The library raises bare Exception, and its panics are no Exception at all.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{path} is damaged ({reason}): download it again.") from None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like as text; in the files they are texts or {"content": text, ...}."""
    found = {}
    for name in _NAMED:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _add_tokens(backend: Backend, config: Mapping[str, Any], directory: Path) -> None:
    """Add the tokens that only tokenizer_config.json has; mark as special those that it marks."""
    listed = config.get("added_tokens_decoder")
    if listed is None:
        return
    try:
        tokens = [(int(key), _added_token(listed[key])) for key in sorted(listed, key=int)]
    except (AttributeError, LookupError, TypeError, ValueError):
        raise TokenizerError(
            f'"added_tokens_decoder" in {directory / "tokenizer_config.json"} is damaged: '
            "download the file again."
        ) from None
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in tokens:
        present = backend.token_to_id(token.content)
        if present is None and token_id != backend.get_vocab_size(with_added_tokens=True):
            logger.warning(
                "%s: token %r can't have the id %d of tokenizer_config.json and is left out",
                directory, token.content, token_id,
            )  # fmt: skip
        elif present is None or (
            token.special and not (token.content in known and known[token.content].special)
        ):
            add = backend.add_special_tokens if token.special else backend.add_tokens
            add([token])


def _added_token(value: Mapping[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{flag: bool(value.get(flag, False)) for flag in flags})

"""Chat templates: the text that a model wants to see for a list of messages.

``find_templates`` reads those of a checkpoint, ``ChatTemplate.render`` makes the text, with the
variables and functions that transformers gives to templates. What a template from a stranger may
use is bounded by template_meter.py; whatever goes wrong in one is a TokenizerError.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import CodeType
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from .errors import TokenizerError
from .template_meter import MAX_DEPTH, Meter, OverLimitError, RenderLimits
from .template_sandbox import MeteredEnvironment

DEFAULT, TOOL_USE = "default", "tool_use"
_SHOWN = 300  # characters of a template's own message in an error


class _RaisedError(TemplateError):
    """What a template says with ``raise_exception``."""


class ChatTemplate:
    """One template. ``name`` is where it comes from, for errors; ``clock`` is what it takes as now.

    It is compiled on first use and can then render in several threads at once.
    """

    def __init__(
        self,
        source: str,
        name: str = "the chat template",
        *,
        limits: RenderLimits | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.source, self.name = source, name
        self._limits, self._clock = limits or RenderLimits(), clock
        self._code: CodeType | None = None

    def __repr__(self) -> str:
        return f"ChatTemplate({self.name}, {len(self.source)} characters)"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_code": None}  # code objects can't be pickled

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of ``messages``; ``variables`` are what else the template reads (bos_token).

        Raises TokenizerError: the template is damaged, refuses the messages, or takes too much.
        """
        given = {
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        functions: dict[str, Callable[..., Any]] = {
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
        }
        try:
            if self._code is None:
                self._code = MeteredEnvironment(Meter(self._limits), functions).code(self.source)
            variables = {name: _plain(value) for name, value in given.items()}
            environment = MeteredEnvironment(Meter(self._limits), functions)
            return environment.run(self._code, variables)
        except OverLimitError as error:
            raise TokenizerError(
                f"{self.name} {error} and was stopped: use another one with --chat-template, "
                "or none with --ignore-chat-template."
            ) from None
        except _RaisedError as error:
            raise TokenizerError(f"{self.name} refuses these messages: {_shown(error)}.") from None
        except TemplateSyntaxError as error:
            raise TokenizerError(
                f"{self.name} is not valid at line {error.lineno}: {_shown(error.message)}."
            ) from None
        except TokenizerError:
            raise
        except Exception as error:  # a stranger's template can raise anything
            raise TokenizerError(
                f"{self.name} failed on these messages: {_shown(error) or type(error).__name__}."
            ) from error

    def _strftime_now(self, format: str) -> str:
        if not isinstance(format, str) or len(format) > _SHOWN:
            raise OverLimitError(f"asked for a date in more than {_SHOWN} characters")
        return self._clock().strftime(format)


def find_templates(
    directory: Path, tokenizer_config: Mapping[str, Any], **options: Any
) -> dict[str, ChatTemplate]:
    """The templates of a checkpoint by name, "default" first; an empty dict where it has none.

    chat_template.jinja and additional_chat_templates/NAME.jinja, else "chat_template" in
    tokenizer_config.json: one text, or a list of {"name", "template"}. ``options`` go to
    ChatTemplate. Raises TokenizerError naming the file that can't be read.
    """
    sources: dict[str, tuple[str, str]] = {}
    main = directory / "chat_template.jinja"
    if main.is_file():
        sources[DEFAULT] = (_read(main), f"The chat template {main}")
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        sources.setdefault(path.stem, (_read(path), f"The chat template {path}"))
    if not sources:
        config_name = directory / "tokenizer_config.json"
        listed = tokenizer_config.get("chat_template")
        if isinstance(listed, str):
            listed = [{"name": DEFAULT, "template": listed}]
        for entry in listed if isinstance(listed, list) else [listed] * (listed is not None):
            if not isinstance(entry, Mapping) or not isinstance(entry.get("template"), str):
                raise TokenizerError(
                    f'{config_name}: "chat_template" is neither a text nor a list of '
                    '{"name", "template"}.'
                )
            name = str(entry.get("name", DEFAULT))
            shown = "" if name == DEFAULT else f' "{name}"'
            sources[name] = (entry["template"], f"The chat template{shown} in {config_name}")
    return {name: ChatTemplate(text, origin, **options) for name, (text, origin) in sources.items()}


def choose_template(
    templates: Mapping[str, ChatTemplate], *, tools: bool, name: str | None = None
) -> ChatTemplate:
    """The template called ``name``; without a name "tool_use" for tools where it exists.

    Raises TokenizerError listing the names there are.
    """
    if name is None:
        name = TOOL_USE if tools and TOOL_USE in templates else DEFAULT
    if name in templates:
        return templates[name]
    raise TokenizerError(
        f'There is no chat template "{name}"; the checkpoint has: {", ".join(templates)}.'
    )


def _raise_exception(message: Any = "") -> None:
    raise _RaisedError(str(message)[: 10 * _SHOWN])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"The chat template {path} can't be read: {_shown(error)}.") from None


def _shown(error: Any) -> str:
    """A message as the end of a sentence: one line, not too long, without its full stop."""
    text = " ".join(str(error).split()).rstrip(".")
    shown = "".join(c if c.isprintable() else "?" for c in text[:_SHOWN])
    return shown if len(text) <= _SHOWN else shown + "\N{HORIZONTAL ELLIPSIS}"


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy of ``value`` in plain types: a template can call methods of whatever it gets."""
    if depth > MAX_DEPTH:
        raise TokenizerError(f"Messages and tools may be nested at most {MAX_DEPTH} deep.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {_plain(k, depth + 1): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    raise TokenizerError(
        f"Messages and tools for a chat template must be texts, numbers, lists and dicts; "
        f"{type(value).__name__} is none of them."
    )

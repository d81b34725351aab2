"""Filters and tests of chat templates: jinja2's, paid for (template_meter.py), and ``tojson``.

Left out are those that make HTML or draw at random. All take the context, where they find the
meter; that also keeps jinja2 from evaluating them while it compiles.
"""

import json
import re
from collections.abc import Callable
from typing import Any, cast

from jinja2 import pass_context
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.tests import TESTS as JINJA_TESTS
from markupsafe import escape

from .template_meter import MAX_INTEGER_BITS, MAX_ITEMS, NODE, Meter, OverLimitError, refuse

MAX_STRIP = 256  # str.strip(chars) takes len(text) * len(chars) steps
_NUMBERS = re.compile(r"\d+")
# A width taken from the arguments. After "%(key)" the rest can't be told apart safely by a pattern.
_STARRED = re.compile(r"%[-#0 +\d.]*\*|%\(.*\*", re.DOTALL)

# Filters that template_sandbox.py puts into a template's tree. No template can write these names.
TEXT, EACH, TICK, SETTLE = "metered text", "metered items", "metered step", "metered value"


def widths(specification: str) -> int:
    """No fewer characters than the widths and precisions in a format specification ask for."""
    return sum(int(digits[:12]) for digits in _NUMBERS.findall(specification))


def count(value: Any) -> int:
    """``value`` as a number of characters; 0 for what is no number."""
    return max(0, value) if isinstance(value, int) else 0


def charge_replace(meter: Meter, text: str, old: Any, new: Any, limit: Any = -1) -> None:
    """Pay for ``text.replace(old, new, limit)``."""
    if isinstance(old, str) and isinstance(new, str):
        found = text.count(old)
        if isinstance(limit, int) and limit >= 0:
            found = min(found, limit)
        meter.charge(len(text) + found * len(new))


def check_strip(characters: Any) -> None:
    """Refuse ``text.strip(characters)`` where that would be slow."""
    if isinstance(characters, str) and len(characters) > MAX_STRIP:
        raise OverLimitError(f"strips more than {MAX_STRIP} different characters")


def charge_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Pay for, or refuse, what ``left operator right`` will make."""
    meter.tick()
    sized = str | list | tuple
    if operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        meter.charge((1 if isinstance(left, str) else NODE // 8) * (len(left) + len(right)))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, sized) and count(times) > 1:
                meter.charge(times * (len(value) if isinstance(value, str) else meter.weigh(value)))
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * count(right))
    elif operator == "%" and isinstance(left, str):
        if _STARRED.search(left):
            raise refuse("'*' in a format string")
        meter.charge(len(left) + 10 * left.count("%") * meter.weigh(right) + widths(left))


def _check_bits(bits: int) -> None:
    if bits > 2 * MAX_INTEGER_BITS:
        raise OverLimitError(f"made an integer of more than {MAX_INTEGER_BITS} bits")


def _meter(context: Context) -> Meter:
    return context.environment.meter  # type: ignore[attr-defined]


@pass_context
def _text(context: Context, value: Any) -> str:
    return _meter(context).text(value)


@pass_context
def _each(context: Context, value: Any) -> Any:
    return _meter(context).each(value)


@pass_context
def _tick(context: Context, value: Any) -> Any:
    _meter(context).tick()
    return value


@pass_context
def _settle(context: Context, value: Any) -> Any:
    return _meter(context).settle(value)


@pass_context
def _escape(context: Context, value: Any) -> str:
    # Plain text: jinja2's Markup would go on to escape whatever is added to it.
    return str(_meter(context).settle(escape(_meter(context).text(value))))


@pass_context
def _format(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
    text = _meter(context).text(value)
    return context.environment.call_binop(context, "%", text, kwargs or args)  # type: ignore[attr-defined]


@pass_context
def _join(context: Context, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    meter = _meter(context)
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    pieces = [meter.text(item) for item in meter.each(value)]
    glue = meter.text(d)
    meter.charge(sum(map(len, pieces)) + len(glue) * len(pieces))
    return glue.join(pieces)


@pass_context
def _replace(context: Context, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    meter = _meter(context)
    text, old, new = meter.text(value), meter.text(old), meter.text(new)
    limit = -1 if count is None else count
    charge_replace(meter, text, old, new, limit)
    return text.replace(old, new, limit)


@pass_context
def _sum(context: Context, value: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    for item in _meter(context).each(value):
        start = context.environment.call_binop(context, "+", start, item)  # type: ignore[attr-defined]
    return start


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers has it for templates: unlike jinja2's own, not escaped for HTML."""
    meter = _meter(context)
    if isinstance(indent, int) and indent > MAX_STRIP:
        raise OverLimitError(f"indents by more than {MAX_STRIP} spaces")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    meter.charge(6 * meter.weigh(value))  # six: \u0000 for one character
    if indent is None and separators is None:
        return encoder.encode(value)
    pieces = []
    for piece in encoder.iterencode(
        value
    ):  # indentation grows with the depth: paid for as it comes
        meter.charge(len(piece))
        pieces.append(piece)
    return "".join(pieces)


def _check_center(meter: Meter, value: str, width: int = 80) -> None:
    meter.charge(count(width))


def _check_indent(meter: Meter, value: str, width: int | str = 4, *_: Any, **__: Any) -> None:
    per_line = len(width) if isinstance(width, str) else count(width)
    meter.charge(len(value) + (1 + per_line) * (1 + len(value.splitlines())))


def _check_batch(meter: Meter, value: Any, linecount: int, *_: Any, **__: Any) -> None:
    if count(linecount) > MAX_ITEMS:
        raise OverLimitError(f"made a list of more than {MAX_ITEMS} items")


def _check_round(meter: Meter, value: Any, precision: int = 0, *_: Any, **__: Any) -> None:
    if isinstance(precision, int) and abs(precision) > MAX_STRIP:
        raise OverLimitError(f"rounds to more than {MAX_STRIP} digits")


def _check_trim(meter: Meter, value: str, chars: Any = None) -> None:
    check_strip(chars)


def _check_characters(meter: Meter, value: Any, *_: Any, **__: Any) -> None:
    if isinstance(value, str):
        meter.charge(NODE * len(value))  # every character becomes a string of its own


_ITERATING = "groupby list map max min reject rejectattr select selectattr slice sort unique"
_OF_TEXT = "capitalize center lower title trim upper wordcount"
_FROM_JINJA = f"""
    {_ITERATING} {_OF_TEXT} abs attr batch count d default dictsort first float indent int items
    last length reverse round truncate
"""

_CHECKS: dict[str, Callable[..., None]] = {
    "batch": _check_batch,
    "center": _check_center,
    "indent": _check_indent,
    "round": _check_round,
    "trim": _check_trim,
    **dict.fromkeys(_ITERATING.split(), _check_characters),
}


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """jinja2's filter or test ``function`` with its arguments checked and its result paid for."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    check, of_text = _CHECKS.get(name), name in _OF_TEXT.split()

    @pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        meter.tick()
        if of_text and not isinstance(value, str):
            value = meter.text(value)
        if check is not None:
            check(meter, value, *args, **kwargs)
        passed: tuple[Any, ...] = ()
        if wanted == "context":
            passed = (context,)
        elif wanted == "eval_context":
            passed = (context.eval_ctx,)
        elif wanted == "environment":
            passed = (context.environment,)
        return meter.settle(function(*passed, value, *args, **kwargs))

    return metered


FILTERS: dict[str, Callable[..., Any]] = {
    name: _metered(name, cast(Callable[..., Any], JINJA_FILTERS[name]))
    for name in _FROM_JINJA.split()
} | {
    TEXT: _text,
    EACH: _each,
    TICK: _tick,
    SETTLE: _settle,
    "e": _escape,
    "escape": _escape,
    "format": _format,
    "join": _join,
    "replace": _replace,
    "safe": _text,
    "string": _text,
    "sum": _sum,
    "tojson": _tojson,
}
TESTS: dict[str, Callable[..., Any]] = {
    name: _metered("", cast(Callable[..., Any], function)) for name, function in JINJA_TESTS.items()
}

"""A jinja2 sandbox in which everything that takes time or memory is metered (template_meter.py).

Why inside the process and not in one that can be killed: starting Python with jinja2 takes 80 ms, a
helper that is kept running is one more thing to lose, macOS enforces no memory limit on a process,
and alarm signals reach the main thread only. Here a chat turn costs 0.3 to 0.7 ms, twice what
jinja2 alone takes, in any thread and on any system.

Why it holds: a template has only what this file and template_filters.py give it.
- Syntax: before compiling, every loop, piece of output, ``~``, comparison, slice and list in the
  template's tree is passed through a filter that reports to the meter (``_Rewriter``).
- Operators, calls and methods arrive in ``MeteredEnvironment``, which pays for the result first.
- Functions, filters, tests and methods are the listed ones. What can grow beyond its arguments
  (``replace``, ``center``, ``%``, ``tojson`` with indentation, ...) is paid for beforehand.
- jinja2 evaluates nothing while it compiles: no filter is constant, no operator either.
A step that the meter doesn't see works on values of bounded weight, so it ends by itself.
"""

from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from .template_filters import (
    EACH,
    FILTERS,
    SETTLE,
    TESTS,
    TEXT,
    TICK,
    charge_operator,
    charge_replace,
    check_strip,
    count,
    widths,
)
from .template_meter import MAX_DEPTH, Meter, OverLimitError, refuse

# Bounds of compiling, which takes 0.15 ms a node, and more in nested scopes: these keep it within
# two seconds. Long templates in use have 30 000 characters and 1500 nodes.
MAX_SOURCE, MAX_NODES, MAX_SCOPES = 128 * 1024, 10_000, 20
_OF_THE_COMPILER = ("_loop_vars", "_block_vars")  # keywords that jinja2 itself adds to calls

_OF_STRINGS = """
    capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit
    isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip
    partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split
    splitlines startswith strip swapcase title upper zfill
"""
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_OF_STRINGS.split()),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    float: frozenset(("is_integer",)),
    LoopContext: frozenset(("changed", "cycle")),
    Cycler: frozenset(("next", "reset")),
}


class TemplateNamespace(Namespace):
    """jinja2's namespace; it can hold itself, so it isn't printed with what it holds."""

    def __repr__(self) -> str:
        return "<namespace>"


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one rendering: ``MeteredEnvironment(meter).run(code, variables)``.

    ``functions`` are further functions for the template; their results are charged like all others.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(
        self, meter: Meter, functions: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            optimized=False,
            cache_size=0,
        )
        self.meter = meter
        self.filters, self.tests = dict(FILTERS), dict(TESTS)
        self.globals = {
            "range": self.globals["range"],
            "dict": _new_dict,
            "namespace": TemplateNamespace,
            "cycler": Cycler,
            "joiner": Joiner,
            **(functions or {}),
        }
        self._functions = list(self.globals.values())

    def code(self, source: str) -> CodeType:
        """``source`` compiled with its meters; valid for every MeteredEnvironment.

        Raises jinja2's TemplateSyntaxError, and for absurd nesting what Python's compiler raises.
        """
        if len(source) > MAX_SOURCE:
            raise TemplateSyntaxError(
                f"it has {len(source)} characters, {MAX_SOURCE} are allowed", 1
            )
        return self.compile(_Rewriter(self).visit(self.parse(source)))

    def run(self, code: CodeType, variables: dict[str, Any]) -> str:
        """The text that the template makes of ``variables``."""
        template = Template.from_code(self, code, self.globals)
        return "".join(template.root_render_func(template.new_context(variables)))

    def call(  # the names are jinja2's: no keyword argument can clash
        __self,
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        meter = __self.meter
        given = {key: value for key, value in kwargs.items() if key not in _OF_THE_COMPILER}
        meter.weigh(args)
        meter.weigh(given)
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, LoopContext):  # {% for ... recursive %} calls loop(items)
            args = tuple(meter.each(items) for items in args)
        elif not isinstance(__obj, _CALLABLE) and not any(__obj is f for f in __self._functions):
            name = _method_name(owner, __obj)
            if name == "join" and args and not isinstance(args[0], str):
                args = (list(meter.each(args[0])), *args[1:])
            if isinstance(owner, str):
                _charge_string_method(meter, owner, name, args, given)
        if meter.depth == MAX_DEPTH:
            raise OverLimitError(f"nested calls more than {MAX_DEPTH} deep")
        meter.depth += 1
        try:
            return meter.settle(super().call(__context, __obj, *args, **kwargs))
        finally:
            meter.depth -= 1

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        charge_operator(self.meter, operator, left, right)
        result = super().call_binop(context, operator, left, right)
        return result if isinstance(result, str) else self.meter.settle(result)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        if value.__name__ != "format":
            raise refuse(f"str.{value.__name__}")
        return _Format(self, value.__self__)


class _Format(SandboxedFormatter):
    """``text.format`` inside a template."""

    def __init__(self, environment: MeteredEnvironment, text: str) -> None:
        super().__init__(environment)
        self._meter, self._text = environment.meter, text

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        self._meter.charge(len(self._text))
        return self.vformat(self._text, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        self._meter.charge(widths(format_spec))
        if not isinstance(value, int | float):
            value = self._meter.text(value)
        return str(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        if conversion:
            self._meter.charge(10 * self._meter.weigh(value))
        return super().convert_field(value, conversion)


class _Generation(Extension):
    """``{% generation %}``: marks what the model wrote, for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Rewriter(NodeTransformer):
    """Puts a metering filter around each part of the tree that jinja2 compiles to bare Python."""

    def __init__(self, environment: MeteredEnvironment) -> None:
        self._environment = environment
        self._nodes = self._scopes = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise TemplateSyntaxError(f"it has more than {MAX_NODES} parts", node.lineno)
        scope = isinstance(node, _SCOPES)
        self._scopes += scope
        if self._scopes > MAX_SCOPES:
            raise TemplateSyntaxError(f"it nests more than {MAX_SCOPES} blocks", node.lineno)
        try:
            return super().visit(node, *args, **kwargs)
        finally:
            self._scopes -= scope

    def _through(self, name: str, node: Any) -> nodes.Expr:
        filtered = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        filtered.set_environment(self._environment)
        return filtered

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [self._through(TEXT, child) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        pieces = [self._through(TEXT, child) for child in node.nodes]
        return self._through(TEXT, nodes.Concat(pieces, lineno=node.lineno))

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._through(EACH, node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._through(TICK, node.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._through(SETTLE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._through(SETTLE, self.generic_visit(node))

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._through(SETTLE, self.generic_visit(node))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._through(SETTLE, node) if node.ctx == "load" else node

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise TemplateSyntaxError(
            "{% autoescape %} is not available in chat templates", node.lineno
        )


def _method_name(owner: Any, method: Any) -> str:
    """The name of a method that templates may call on ``owner``."""
    name = getattr(method, "__name__", type(method).__name__)
    if isinstance(owner, type) or not any(
        isinstance(owner, kind) and name in names for kind, names in _METHODS.items()
    ):
        raise refuse(f"{type(owner).__name__}.{name}" if owner is not None else name)
    return str(name)


def _charge_string_method(
    meter: Meter, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Pay for what a method of str makes beyond its result, or refuse it."""
    if name == "replace":
        charge_replace(meter, text, *args, **kwargs)
    elif name in ("center", "ljust", "rjust", "zfill") and args:
        meter.charge(count(args[0]))
    elif name == "join" and args:
        pieces = args[0]
        meter.charge(sum(len(text) + len(piece) for piece in pieces if isinstance(piece, str)))
    elif name in ("split", "rsplit", "splitlines"):
        meter.charge(4 * len(text))
    elif name in ("lstrip", "rstrip", "strip") and args:
        check_strip(args[0])


_SCOPES = (
    nodes.AssignBlock,
    nodes.Block,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.For,
    nodes.Macro,
    nodes.Scope,
    nodes.With,
)
_CALLABLE = (BlockReference, Joiner, Macro, Undefined, _Format)

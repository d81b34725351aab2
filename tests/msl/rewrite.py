"""Rewrites preprocessed Metal text to the C++ that clang compiles against ``host/metal.h``.

Only what C++ has no form for is touched: kernels and their arguments, explicit instantiations with
a ``host_name``, ``threadgroup`` variables, vector constructors and casts, function constants. Lines
stay where they are.
"""

import re
from dataclasses import dataclass, field

from . import parameters
from .lexer import MetalSyntaxError, Tokens, lex
from .parameters import Argument

_SPACES = ("device", "constant", "threadgroup", "thread")
_VECTOR = re.compile(r"(char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float|bool)[234]$")
_FUNCTION_CONSTANT = re.compile(
    r"constant (?:const )?(\w+) (\w+) ?\[\[ ?function_constant ?\( ?(.+?) ?\) ?\]\]$"
)


@dataclass
class Kernel:
    """A kernel function.

    ``max_threads``  C++ expression of its max_total_threads_per_threadgroup, 0 without one
    ``hosts``        (host name, C++ expression) of what a host can ask for
    """

    name: str
    arguments: list[Argument]
    is_template: bool
    max_threads: str = "0"
    hosts: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class FunctionConstant:
    """``constant TYPE NAME [[function_constant(INDEX)]]``."""

    name: str
    type: str
    index: str


def rewrite(text: str) -> str:
    """The C++ of ``text`` with the tables that the executor reads behind it."""
    tokens = Tokens(lex(re.sub(r"(?m)^#pragma [^\n]*$", "", text)))
    return _Rewriter(tokens).run()


class _Rewriter:
    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.kernels: dict[str, Kernel] = {}
        self.constants: list[FunctionConstant] = []
        self.derived: list[tuple[str, str]] = []
        self.variables = 0
        self.names: dict[str, set[str]] = {}

    def run(self) -> str:
        instances = self._take_instances()
        self._find_kernels()
        self._attach(instances)
        self._find_names()
        self._function_constants()
        self._blank_attributes()
        self._threadgroup_variables()
        self._constructors()
        return "".join(t.text for t in self.tokens) + "\n" + self._tables()

    def _take_instances(self) -> list[tuple[str, str, str]]:
        """Removes ``template [[host_name("h")]] ... f<...>...;`` and returns (h, f<...>, place)."""
        found, t = [], self.tokens
        for i in range(len(t)):
            start = t.after(i)
            if t.at(i) != "template" or not t.is_attribute(start):
                continue
            end = self.tokens.closing_statement(i)
            host = self._host_name(start, t.closing(start) + 1)
            j = t.skip_attributes(start)
            while t.at(j) == "kernel" or t.is_attribute(j):
                j = t.skip_attributes(t.after(j)) if t.at(j) == "kernel" else t.skip_attributes(j)
            # `decltype(f<...>) f<...>;` or `void f<...>(...);`
            name = t.after(t.closing(t.after(j))) if t.at(j) == "decltype" else t.after(j)
            stop = name
            while t.at(stop) not in ("(", ";"):
                stop = t.closing_angle(stop) + 1 if t.at(stop) == "<" else stop + 1
            if host is None:
                raise MetalSyntaxError(f"{t[i].place}: an instantiation without host_name")
            found.append((host, t.join(name, stop), t[i].place))
            t.blank(i, end + 1)
        return found

    def _host_name(self, start: int, end: int) -> str | None:
        names = [x for x in self.tokens[start:end] if x.text == "host_name"]
        return (
            "".join(x.text[1:-1] for x in self.tokens[start:end] if x.kind == "string")
            if names
            else None
        )

    def _find_kernels(self) -> None:
        t = self.tokens
        for i in range(len(t)):
            if t.at(i) != "kernel" or t[i].kind != "name":
                continue
            j = t.after(i)
            while t.at(j) == ",":  # [[kernel, another(...)]]
                j = t.after(t.closing(t.after(t.after(j))))
            while t.at(j) == "]":
                j = t.after(j)
            j = t.skip_attributes(j)
            name, open_ = t.after(j), t.after(t.after(j))
            if t.at(open_) != "(":
                continue
            if t.at(j) != "void":
                raise MetalSyntaxError(f"{t[i].place}: kernel '{t.at(name)}' has to return void")
            first = t.declaration_start(i)
            is_template = t.at(first) == "template"
            arguments = [self._argument(a, b) for a, b in t.split(open_ + 1, t.closing(open_))]
            self._number_buffers(arguments)
            parameters.check(arguments, t[i].place)
            kernel = Kernel(t.at(name), arguments, is_template, self._max_threads(first, name))
            if not is_template:
                host = self._host_name(first, name)
                kernel.hosts.append((host or kernel.name, kernel.name))
            self.kernels[kernel.name] = kernel

    def _max_threads(self, start: int, end: int) -> str:
        t = self.tokens
        for i in range(start, end):
            if t.at(i) == "max_total_threads_per_threadgroup":
                return t.join(t.after(i) + 1, t.closing(t.after(i)))
        return "0"

    def _argument(self, start: int, end: int) -> Argument:
        t = self.tokens
        at = next((i for i in range(start, end) if t.is_attribute(i)), end)
        inside = t.join(at + 2, t.closing(at) - 1) if at < end else ""
        parts = re.findall(r"(\w+)(?: ?\( ?(\w+) ?\))?", inside)
        guard = next((p[1] for p in parts if p[0] == "function_constant"), "")
        main = next((p for p in parts if p[0] != "function_constant"), ("", ""))
        return Argument(t.join(start, at), main[0], main[1], guard)

    def _number_buffers(self, arguments: list[Argument]) -> None:
        """A pointer without attribute gets the next free buffer, as Metal numbers them."""
        used = {a.index for a in arguments if a.attribute == "buffer"}
        for a in arguments:
            if not a.attribute and re.search(r"\b(device|constant)\b", a.declaration):
                a.attribute, a.index = (
                    "buffer",
                    next(str(n) for n in range(31) if str(n) not in used),
                )
                used.add(a.index)
            if not a.attribute:
                raise MetalSyntaxError(f"kernel parameter '{a.declaration}' has no attribute")

    def _attach(self, instances: list[tuple[str, str, str]]) -> None:
        for host, expression, place in instances:
            base = re.split(r"[<(]", expression)[0].strip().split("::")[-1]
            if base not in self.kernels:
                raise MetalSyntaxError(
                    f"{place}: host_name \"{host}\" of '{base}', which is no kernel"
                )
            self.kernels[base].hosts.append((host, expression))
        names = [h for k in self.kernels.values() for h, _ in k.hosts]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise MetalSyntaxError(f"two kernels have the host name '{min(twice)}'")

    def _find_names(self) -> None:
        """Which names each function's body has: what a kernel uses is what these lead to."""
        t = self.tokens
        for name, start, end in t.functions():
            self.names.setdefault(t.at(name), set()).update(
                x.text for x in t[start:end] if x.kind == "name"
            )

    def _used_constants(self, kernel: Kernel) -> list[int]:
        """Positions of the function constants that ``kernel`` can't do without."""
        found, pending = set(), [kernel.name, *(a.guard for a in kernel.arguments)]
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                pending += self.names.get(name, ())
        return [n for n, c in enumerate(self.constants) if c.name in found]

    def _function_constants(self) -> None:
        """Function constants become variables; constants that follow from them are set anew."""
        t, changing, i = self.tokens, set(), -1
        while i + 1 < len(t):
            i += 1
            if t.at(i) == "(" or (t.at(i) == "{" and not t.opens_namespace(i)):
                i = t.closing(i)
            if t.at(i) != "constant":
                continue
            end = self.tokens.closing_statement(i)
            text = t.join(i, end)
            match = _FUNCTION_CONSTANT.match(text)
            if match:
                name = match[2]
                self.constants.append(FunctionConstant(name, match[1], match[3]))
                if t.at(t.before(i)) == "static":
                    t.blank(t.before(i), i)
                self._replace(i, end, f"static {match[1]} {name}; static bool msl_defined_{name}")
                changing.add(name)
            elif "=" in text and any(x.text in changing for x in t[i:end]):
                left, right = text.split("=", 1)
                words = left.split()
                name, type_ = (
                    words[-1],
                    " ".join(w for w in words[:-1] if w not in ("constant", "const")),
                )
                self.derived.append((name, _is_defined(right.strip())))
                self.names[name] = set(re.findall(r"\w+", right))
                self._replace(i, end, f"static {type_} {name}")
                changing.add(name)
        for i in range(len(t)):
            if t.at(i) == "is_function_constant_defined":
                close = t.closing(t.after(i))
                self._replace(i, close + 1, "msl_defined_" + t.join(t.after(t.after(i)), close))
        self.optional = {x.text[12:] for x in t if x.text.startswith("msl_defined_")}
        for _, value in self.derived:
            self.optional.update(re.findall(r"\bmsl_defined_(\w+)", value))

    def _replace(self, start: int, end: int, text: str) -> None:
        self.tokens.blank(start, end)
        self.tokens[start].text = text + self.tokens[start].text

    def _blank_attributes(self) -> None:
        t = self.tokens
        for i in range(len(t)):
            if t.is_attribute(i):
                t.blank(i, t.closing(i) + 1)

    def _threadgroup_variables(self) -> None:
        t = self.tokens
        for i in range(len(t)):
            if t.at(i) != "threadgroup" or t.at(t.before(i)) not in ("{", ";", "}", ")", ":"):
                continue
            stop = i
            while t.at(stop) not in ("[", ";", "*", "&", "(", "=", "", ","):
                stop = t.closing_angle(stop) + 1 if t.at(stop) == "<" else stop + 1
            if t.at(stop) in ("[", ";", ","):
                self._threadgroup_variable(i, self.tokens.closing_statement(i))

    def _threadgroup_variable(self, i: int, end: int) -> None:
        t, text = self.tokens, ""
        declarators = t.split(t.after(i), end)
        type_ = ""
        for n, (a, b) in enumerate(declarators):
            bracket = next((j for j in range(a, b) if t.at(j) == "["), b)
            name = t.before(bracket)
            if n == 0:
                type_ = t.join(a, name)
            text += (
                f"MSL_THREADGROUP_VARIABLE({self.variables}, ({type_}), {t.at(name)}, "
                f"{t.join(bracket, b)}); "
            )
            self.variables += 1
        self._replace(i, end, text)

    def _vector_names(self) -> set[str]:
        """Names that may stand for a vector: aliases and type parameters of templates."""
        t, names = self.tokens, set()
        for i, token in enumerate(t):
            following = t.after(i)
            if token.text == "using" and t.at(t.after(following)) == "=":
                names.add(t.at(following))
            elif token.text == "typedef":
                names.add(t.at(t.before(self.tokens.closing_statement(i))))
            elif token.text in ("typename", "class") and t.at(t.before(i)) in ("<", ","):
                names.add(t.at(following))
        return names

    def _constructors(self) -> None:
        """``float4(...)``, ``(float4)x``, ``static_cast<float4>(x)`` of what may be a vector."""
        t, aliases = self.tokens, self._vector_names()
        for i in range(len(t)):
            token = t[i]
            if token.kind != "name":
                continue
            if token.text == "static_cast":
                end = t.closing_angle(t.after(i))
                type_ = t.join(t.after(i) + 1, end)
                if _VECTOR.match(type_) or type_ in aliases or re.match(r"(metal::)?vec ?<", type_):
                    self._replace(i, end + 1, f"::msl::make<{type_}>")
                continue
            if not (_VECTOR.match(token.text) or token.text in aliases or token.text == "vec"):
                continue
            end = i
            if token.text == "vec":
                if t.at(t.after(i)) != "<":
                    continue
                end = t.closing_angle(t.after(i))
            self._constructor(i, end)

    def _constructor(self, i: int, end: int) -> None:
        t = self.tokens
        type_, previous, following = t.join(i, end + 1), t.before(i), t.after(end)
        qualifier = previous
        if t.at(previous) == "::" and t.at(t.before(previous)) == "metal":
            qualifier = t.before(t.before(previous))
        if t.at(following) == "(":
            before = t.at(qualifier)
            declares = t[qualifier].kind == "name" and before not in (
                "return",
                "else",
                "case",
                "do",
            )
            if not declares and before not in (".", "->", "~", "operator", "*>", "::"):
                self._replace(t.after(qualifier), end + 1, f"::msl::make<{type_}>")
        elif t.at(following) == ")" and t.at(qualifier) == "(":
            outer, operand = t.before(qualifier), t.after(following)
            is_cast = (t[outer].kind == "mark" and t.at(outer) not in (")", "]", ">")) or t.at(
                outer
            ) == "return"
            starts = t[operand].kind in ("name", "number") or t.at(operand) in ("(", "-", "~")
            if is_cast and starts and t.at(operand) not in _SPACES:
                self._replace(qualifier, following + 1, f"::msl::Cast<{type_}>{{}} ->* ")

    def _tables(self) -> str:
        return "\n".join(['# 1 "<tables>"', *self._kernel_table(), *self._constant_table(), ""])

    def _kernel_table(self) -> list[str]:
        lines: list[str] = []
        entries: list[str] = []
        for kernel in self.kernels.values():
            for host, expression in kernel.hosts:
                n = len(entries)
                call = ", ".join(_binding(a) for a in kernel.arguments)
                lines.append(
                    '__attribute__((no_sanitize("thread", "undefined"))) '
                    f"static void msl_thread_{n}() {{ {expression}({call}); }}"
                )
                rows = [
                    f'{{"{a.name}", "{a.declaration}", {a.index}, '
                    f"::msl::parameter_is_const<{i}>({expression}), "
                    f"::msl::parameter_size<{i}>({expression}), {int(bool(a.guard))}}}"
                    for i, a in enumerate(kernel.arguments)
                    if a.attribute == "buffer"
                ]
                table = ", ".join(rows) or "{}"
                lines.append(f"static const msl_parameter msl_parameters_{n}[] = {{{table}}};")
                used = ", ".join(map(str, self._used_constants(kernel)))
                lines.append(f"static const msl_u32 msl_uses_{n}[] = {{{used or 0}}};")
                entries.append(
                    f'{{"{host}", msl_thread_{n}, msl_parameters_{n}, {len(rows)}, '
                    f"msl_uses_{n}, {used.count(',') + 1 if used else 0}, {kernel.max_threads}}}"
                )
        if not entries:
            raise MetalSyntaxError("the text has no kernel that a host can ask for")
        return [
            *lines,
            f'extern "C" const msl_kernel_entry msl_kernels[] = {{{", ".join(entries)}}};',
            f'extern "C" const msl_u32 msl_kernels_count = {len(entries)};',
        ]

    def _constant_table(self) -> list[str]:
        rows = [
            f'{{"{c.name}", {c.index}, &{c.name}, sizeof({c.type}), &msl_defined_{c.name}, '
            f"{'false' if c.name in self.optional else 'true'}}}"
            for c in self.constants
        ]
        body = " ".join(f"{name} = {value};" for name, value in self.derived)
        return [
            f'extern "C" const msl_constant_entry msl_constants[] = {{{", ".join(rows) or "{}"}}};',
            f'extern "C" const msl_u32 msl_constants_count = {len(rows)};',
            '__attribute__((no_sanitize("thread"))) '
            f'extern "C" void msl_derive_constants() {{ {body} }}',
        ]


def _is_defined(text: str) -> str:
    return re.sub(r"is_function_constant_defined ?\( ?(\w+) ?\)", r"msl_defined_\1", text)


def _binding(a: Argument) -> str:
    name = "threadgroup_" if a.attribute == "threadgroup" else a.attribute
    return f"::msl::argument::{name}({a.index})"

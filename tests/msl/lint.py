"""Rejects what C++ accepts and Metal 3.1 doesn't."""

import re
from dataclasses import dataclass

from .lexer import MetalSyntaxError, Tokens, lex

_SPACES = {"device", "constant", "threadgroup", "thread", "ray_data", "object_data"}
_FORBIDDEN = {
    **dict.fromkeys(["double", "wchar_t", "thread_local", "mutable", "virtual", "goto"], ""),
    **dict.fromkeys(["new", "delete", "malloc", "free"], ": memory can't be allocated"),
    **dict.fromkeys(["try", "catch", "throw", "noexcept"], ": there are no exceptions"),
    **dict.fromkeys(["dynamic_cast", "typeid", "asm", "friend", "co_await", "co_yield"], ""),
    "std": ": its library is in namespace metal",
    "printf": "",
    "thread_elements": " that a program may rely on: a device places them as it likes",
}
_SCALARS = {
    "void", "bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half",
    "bfloat", "float", "unsigned", "signed", "size_t", "ptrdiff_t", "int8_t", "uint8_t", "int16_t",
    "uint16_t", "int32_t", "uint32_t", "int64_t", "uint64_t",
}  # fmt: skip
_VECTOR = re.compile(
    r"(packed_)?(char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float|bool)[234]$"
)
_CONTROL = {
    "if",
    "for",
    "while",
    "switch",
    "return",
    "sizeof",
    "alignof",
    "static_assert",
    "decltype",
}
_NO_VARIABLE = {
    "using", "typedef", "template", "struct", "class", "enum", "union", "namespace",
    "static_assert", "extern", "friend",
}  # fmt: skip


@dataclass
class _Function:
    name: str
    is_kernel: bool
    place: str
    start: int  # of the body's brace
    end: int


def lint(preprocessed: str) -> list[str]:
    """Problems of preprocessed Metal text, each ``file:line: sentence``."""
    tokens = Tokens(lex(re.sub(r"(?m)^#pragma [^\n]*$", "", preprocessed)))
    try:
        return _Lint(tokens).run()
    except MetalSyntaxError as error:
        return [str(error)]


class _Lint:
    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.problems: list[str] = []
        self.functions: list[_Function] = []
        self.types = set(_SCALARS)

    def run(self) -> list[str]:
        self._words()
        self._type_names()
        self._scope(0, len(self.tokens))
        self._pointers()
        self._recursion()
        for function in self.functions:
            self._body(function)
        return sorted(set(self.problems), key=_by_place)

    def _problem(self, i: int, sentence: str) -> None:
        self.problems.append(f"{self.tokens[i].place}: {sentence}")

    def _words(self) -> None:
        t = self.tokens
        attribute_end = -1
        for i, token in enumerate(t):
            if t.is_attribute(i):
                attribute_end = t.closing(i)
            if token.kind == "name" and token.text in _FORBIDDEN:
                self._problem(i, f"Metal has no '{token.text}'{_FORBIDDEN[token.text]}")
            elif token.text == "long" and t.at(t.after(i)) in ("long", "double"):
                self._problem(i, f"Metal has no 'long {t.at(t.after(i))}'")
            elif token.kind == "string" and token.text[0] == '"' and i > attribute_end:
                if not self._may_have_string(i):
                    self._problem(i, "Metal has no strings")
            elif token.text == "[" and i > attribute_end and self._is_lambda(i):
                self._problem(i, "Metal has no lambdas")

    def _may_have_string(self, i: int) -> bool:
        t = self.tokens
        if t.at(t.before(t.before(i))) == "__builtin_nanf":
            return True
        return any(
            x.text == "static_assert"
            for x in t[t.declaration_start(t.declaration_start(i) - 1) : i]
        )

    def _is_lambda(self, i: int) -> bool:
        t = self.tokens
        previous = t[t.before(i)]
        subscript = (
            previous.kind in ("name", "number") and previous.text != "return"
        ) or previous.text in (")", "]")
        return not subscript and t.at(t.after(t.closing(i))) in ("(", "{", "->")

    def _type_names(self) -> None:
        t = self.tokens
        for i, token in enumerate(t):
            if token.text in ("struct", "class", "enum", "union", "typename", "using"):
                self.types.add(t.at(t.after(i)))
            elif token.kind == "name" and _VECTOR.match(token.text):
                self.types.add(token.text)
            elif token.text == "typedef":
                self.types.add(t.at(t.before(t.closing_statement(i))))
        self.types -= {"namespace", "class", "{", ""}

    def _scope(self, start: int, end: int) -> None:
        """Declarations of a namespace or struct: finds functions, judges variables."""
        t = self.tokens
        i = t.after(start - 1)
        while i < end:
            if t.at(i) in (";", "}", ":") or t.at(i) in ("public", "private"):
                i = t.after(i)
                continue
            i = self._declaration(i, end)

    def _declaration(self, first: int, end: int) -> int:
        """Judges the declaration at ``first``; returns the position behind it."""
        t, i, name, call = self.tokens, first, -1, -1
        while i < end and t.at(i) != ";":
            if t.at(i) == "(" and call < 0 and t[t.before(i)].kind == "name":
                name, call = t.before(i), i
            if t.at(i) == "{":
                close = t.closing(i)
                self._braces(first, i, close, name, call)
                if t.at(t.before(i)) != "=" and t.at(t.after(close)) != ";":
                    return t.after(close)
                i = close
            elif t.at(i) in ("(", "["):
                i = t.closing(i)
            i = t.after(i)
        self._variable(first, i, call)
        return t.after(i)

    def _braces(self, first: int, open_: int, close: int, name: int, call: int) -> None:
        t = self.tokens
        words = [x.text for x in t[first:open_] if x.kind == "name"]
        if t.opens_namespace(open_) or t.at(first) == "extern":
            self._scope(open_ + 1, close)
        elif call >= 0 and "=" not in [x.text for x in t[first:call]]:
            is_kernel = "kernel" in words
            self.functions.append(_Function(t.at(name), is_kernel, t[name].place, open_, close))
        elif {"struct", "class", "union"} & set(words):
            self._scope(open_ + 1, close)

    def _variable(self, first: int, end: int, call: int) -> None:
        t = self.tokens
        words = [x.text for x in t[first:end] if x.kind == "name"]
        if (
            not words
            or words[0] in _NO_VARIABLE
            or (self._inside_struct(first) and "static" not in words)
        ):
            return
        assigned = next((i for i in range(first, end) if t.at(i) == "="), end)
        if call >= 0 and call < assigned and "operator" not in words:
            return  # a function's declaration
        if "constant" not in words and "operator" not in words:
            self._problem(first, "a variable outside of functions has to be in 'constant'")

    def _inside_struct(self, i: int) -> bool:
        t, depth = self.tokens, 0
        for j in range(i - 1, -1, -1):
            depth += (t.at(j) == "}") - (t.at(j) == "{")
            if depth < 0:
                return not t.opens_namespace(j)
        return False

    def _pointers(self) -> None:
        t = self.tokens
        for i, token in enumerate(t):
            if token.kind != "name" or token.text not in self.types:
                continue
            if t.at(t.before(i)) in (".", "->", "struct", "class", "typename", "using", "enum"):
                continue
            words = self._words_before(i)
            j = t.after(i)
            if t.at(j) == "<":
                try:
                    j = t.after(t.closing_angle(j))
                except MetalSyntaxError:
                    continue
            while j < len(t) and t[j].kind == "name":
                words.add(t.at(j))
                j = t.after(j)
            if t.at(j) in ("*", "&", "&&") and not words & _SPACES and self._declares(i, j):
                self._problem(i, f"a pointer or reference to '{token.text}' without address space")
            elif t.at(j) == "*" and self._declares(i, j):
                self._outer_pointer(i, j)

    def _outer_pointer(self, i: int, star: int) -> None:
        """Each further ``*`` or ``&`` of a declarator says where its pointer lives, too."""
        t, words, j = self.tokens, set(), self.tokens.after(star)
        while t.at(j) in _SPACES or t.at(j) in ("const", "volatile"):
            words.add(t.at(j))
            j = t.after(j)
        if t.at(j) in ("*", "&") and not words & _SPACES:
            self._problem(i, f"a pointer to a pointer to '{t.at(i)}' without address space")

    def _words_before(self, i: int) -> set[str]:
        """The names in front of a type: its qualifiers and the scopes it is in (`A<B>::type`)."""
        t, words, j = self.tokens, set(), self.tokens.before(i)
        while j >= 0 and (t[j].kind == "name" or t.at(j) in ("::", ">")):
            if t.at(j) == ">":
                if t.at(t.after(j)) != "::":
                    break
                depth = 0
                while j >= 0:
                    depth += (t.at(j) == ">") - (t.at(j) == "<")
                    if depth == 0:
                        break
                    j -= 1
            words.add(t.at(j))
            j = t.before(j)
        return words

    def _declares(self, i: int, star: int) -> bool:
        """Whether only qualifiers stand between the type at ``i`` and the mark ``*`` or ``&``."""
        t, j = self.tokens, self.tokens.after(i)
        if t.at(j) == "<":
            j = t.after(t.closing_angle(j))
        while t.at(j) in ("const", "volatile", "unsigned", "int", "long", "short", "char"):
            j = t.after(j)
        return j == star

    def _body(self, function: _Function) -> None:
        t = self.tokens
        for i in range(function.start, function.end):
            if t.at(i) == "static" and t.at(t.before(i)) in ("{", "}", ";", ")"):
                end = t.closing_statement(i)
                if all(x.text != "constant" for x in t[i:end]):
                    self._problem(i, "a static variable has to be in 'constant'")
            if t.at(i) != "threadgroup" or t.at(t.before(i)) not in ("{", "}", ";", ")", ":"):
                continue
            end = t.closing_statement(i)
            stop = next((j for j in range(i, end) if t.at(j) in ("*", "&", "(", "[", "=")), end)
            if t.at(stop) in ("*", "&", "("):
                continue
            if not function.is_kernel:
                self._problem(i, f"a threadgroup variable in '{function.name}', which is no kernel")
            if any(t.at(j) in ("=", "{") for j in range(i, end)):
                self._problem(i, "a threadgroup variable can't have an initial value")

    def _recursion(self) -> None:
        t, names = self.tokens, {f.name for f in self.functions}
        calls: dict[str, set[str]] = {}
        for f in self.functions:
            body = range(f.start, f.end)
            called = {t.at(i) for i in body if t[i].kind == "name" and t.at(t.after(i)) == "("}
            calls.setdefault(f.name, set()).update(called & names)
        for f in self.functions:
            if f.name in _reachable(calls, f.name):
                self.problems.append(f"{f.place}: '{f.name}' calls itself: Metal has no recursion")


def _reachable(calls: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    pending = list(calls.get(start, ()))
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += calls.get(name, ())
    return found


def _by_place(problem: str) -> tuple[str, int]:
    file, line, _ = problem.split(":", 2)
    return file, int(line)

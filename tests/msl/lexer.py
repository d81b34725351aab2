"""Tokens of preprocessed Metal text, with the file and line each came from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<marker>^\#[^\n]*)
    |(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
    |(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<space>\s+)
    |(?P<mark>::|->\*|->|<<=|>>=|<<|&&|\|\||[-+*/%&|^=!<>]=|\+\+|--|\.\.\.|.)""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
_LINE_MARKER = re.compile(r'# (\d+) "((?:\\.|[^"\\])*)"')
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class MetalSyntaxError(ValueError):
    """The text of a kernel cannot be understood; the message starts with ``file:line:``."""


@dataclass(slots=True)
class Token:
    """``kind``: marker, string, number, name, space or mark (punctuation)."""

    kind: str
    text: str
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def lex(text: str) -> Iterator[Token]:
    """The tokens of preprocessed ``text``: no comments, lines by ``# line "file"`` markers."""
    file, line = "<text>", 1
    for match in _TOKEN.finditer(text):
        kind, value = str(match.lastgroup), match.group()
        yield Token(kind, value, file, line)
        if kind == "marker":
            marker = _LINE_MARKER.match(value)
            if marker:
                file, line = marker[2], int(marker[1]) - 1
        else:
            line += value.count("\n")


class Tokens(list[Token]):
    """A list of tokens and the questions a rewriter asks about it; positions are indices."""

    def after(self, i: int) -> int:
        """The next position that holds more than space; ``len(self)`` behind the last one."""
        i += 1
        while i < len(self) and self[i].kind in ("space", "marker"):
            i += 1
        return i

    def before(self, i: int) -> int:
        """The last position before ``i`` that holds more than space; -1 if there is none."""
        i -= 1
        while i >= 0 and self[i].kind in ("space", "marker"):
            i -= 1
        return i

    def at(self, i: int) -> str:
        """The text at ``i``, or "" outside."""
        return self[i].text if 0 <= i < len(self) else ""

    def closing(self, i: int) -> int:
        """The position of the bracket that closes the one at ``i``."""
        depth = 0
        for j in range(i, len(self)):
            if self[j].kind != "mark":
                continue
            if self[j].text in _CLOSING:
                depth += 1
            elif self[j].text in ")]}":
                depth -= 1
                if depth == 0:
                    return j
        raise MetalSyntaxError(f"{self[i].place}: no bracket closes this '{self[i].text}'")

    def closing_angle(self, i: int) -> int:
        """The position of the ``>`` that closes the ``<`` at ``i``."""
        depth, j = 0, i
        while j < len(self):
            if self[j].kind == "mark":
                if self[j].text == "<":
                    depth += 1
                elif self[j].text == ">":
                    depth -= 1
                elif self[j].text in _CLOSING:
                    j = self.closing(j)
                elif self[j].text in (";", "{"):
                    break
                if depth == 0:
                    return j
            j += 1
        raise MetalSyntaxError(f"{self[i].place}: no '>' closes this '<'")

    def is_attribute(self, i: int) -> bool:
        """Whether ``[[`` stands at ``i``. A subscript can't begin so without a lambda."""
        return self.at(i) == "[" and self.at(i + 1) == "["

    def skip_attributes(self, i: int) -> int:
        """``i``, or the first position behind the attributes that start there."""
        while self.is_attribute(i):
            i = self.after(self.closing(i))
        return i

    def join(self, start: int, end: int) -> str:
        """The text of [start, end) without line markers and on one line."""
        return " ".join("".join(t.text for t in self[start:end] if t.kind != "marker").split())

    def split(self, start: int, end: int) -> list[tuple[int, int]]:
        """[start, end) cut at its outermost commas."""
        parts, begin, j = [], start, start
        while j < end:
            text = self[j].text if self[j].kind == "mark" else ""
            if text in _CLOSING:
                j = self.closing(j)
            elif text == "<" and self[self.before(j)].kind == "name" and self._is_template_list(j):
                j = self.closing_angle(j)
            elif text == ",":
                parts.append((begin, j))
                begin = j + 1
            j += 1
        if any(t.kind not in ("space", "marker") for t in self[begin:end]):
            parts.append((begin, end))
        return parts

    def _is_template_list(self, i: int) -> bool:
        try:
            return all(t.text not in ("&&", "||") for t in self[i : self.closing_angle(i)])
        except MetalSyntaxError:
            return False

    def opens_namespace(self, i: int) -> bool:
        """Whether the brace at ``i`` belongs to a namespace."""
        name = self.before(i)
        return "namespace" in (self.at(name), self.at(self.before(name)))

    def functions(self) -> Iterator[tuple[int, int, int]]:
        """Functions with a body: positions of the name and of the body's braces."""
        i = -1
        while (i := self.after(i)) < len(self):
            last = self.before(i)
            while self.at(last) in ("const", "thread", "device", "constant"):
                last = self.before(last)
            if self.at(i) != "{" or self.at(last) != ")":
                continue
            name, depth = last, 0
            while name >= 0:
                depth += (self.at(name) == ")") - (self.at(name) == "(")
                if depth == 0:
                    break
                name -= 1
            name = self.before(name)
            if self[name].kind == "name":
                end = self.closing(i)
                yield name, i, end
                i = end

    def blank(self, start: int, end: int) -> None:
        """Removes [start, end) but for its line ends, so that the rest stays on its lines."""
        for token in self[start:end]:
            if token.kind != "marker":
                token.kind, token.text = "space", "\n" * token.text.count("\n")

    def closing_statement(self, i: int) -> int:
        """The position of the ``;`` that ends the statement at ``i``, or ``len(self)``."""
        while i < len(self) and self[i].text != ";":
            i = self.closing(i) + 1 if self[i].text in _CLOSING else i + 1
        return i

    def declaration_start(self, i: int) -> int:
        """The first position of the declaration or statement that ``i`` is part of."""
        j = self.before(i)
        while j >= 0:
            text = self[j].text
            if text in (")", "]"):
                depth = 0
                while j >= 0:
                    depth += (self[j].text in (")", "]")) - (self[j].text in ("(", "["))
                    if depth == 0:
                        break
                    j -= 1
            elif text in (";", "{", "}", "(", "["):
                break
            j = self.before(j)
        return self.after(j)

"""Formulas over the names of graders: numbers, `+ - * / ^`, parentheses and eight functions.

Its own parser knows nothing else, so no name, attribute or call in a formula can reach Python.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import add
from operator import mul as multiply
from operator import sub as subtract
from operator import truediv as divide

MOST_CHARACTERS = 2000
MOST_DEPTH = 50

_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|([-+*/^(),]))", re.ASCII)

_FUNCTIONS: dict[str, tuple[Callable[..., float], int | None]] = {
    "min": (min, None),
    "max": (max, None),
    "abs": (abs, 1),
    "floor": (math.floor, 1),
    "ceil": (math.ceil, 1),
    "exp": (math.exp, 1),
    "sqrt": (math.sqrt, 1),
    "log": (math.log, 1),
}
"""Functions with their number of arguments; None for one or more."""

Node = Callable[[Mapping[str, float]], float]
Operation = Callable[[float, float], float]
_OPERATIONS: dict[str, Operation] = {"+": add, "-": subtract, "*": multiply, "/": divide}


class FormulaError(ValueError):
    """Raised for a text that is not a formula, or a formula whose value is not a number."""


@dataclass
class Formula:
    """A parsed formula. Raises FormulaError if `text` is not a formula over these names."""

    text: str
    names: Collection[str]
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if len(self.text) > MOST_CHARACTERS:
            raise FormulaError(f"has more than {MOST_CHARACTERS} characters")
        self._tokens, self._at, self._depth = list(_tokens(self.text)), 0, 0
        self._value = self._sum()
        if self._at < len(self._tokens):
            raise FormulaError(f"{self._tokens[self._at]!r} is not expected here")

    def __call__(self, values: Mapping[str, float]) -> float:
        """Return the value of the formula. Raises FormulaError if it has none, or if the value is not a number."""
        try:
            value = float(self._value(values))
        except (ArithmeticError, ValueError):
            raise FormulaError("has no value for these scores") from None
        if not math.isfinite(value):
            raise FormulaError("has no finite value for these scores")
        return value

    # -- one method per rule of the grammar

    def _sum(self) -> Node:
        return self._chain("+-", self._product)

    def _product(self) -> Node:
        return self._chain("*/", self._signed)

    def _chain(self, signs: str, operand: Callable[[], Node]) -> Node:
        """Parse operands of equal precedence from left to right, in a loop, since a long chain would recurse deeply."""
        first = operand()
        others: list[tuple[Operation, Node]] = []
        while (sign := self._take(*signs)) is not None:
            others.append((_OPERATIONS[sign], operand()))

        def value(values: Mapping[str, float]) -> float:
            result = first(values)
            for operation, node in others:
                result = operation(result, node(values))
            return result

        return value if others else first

    def _signed(self) -> Node:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise FormulaError(f"is nested more than {MOST_DEPTH} deep")
        sign = self._take("-", "+")
        if sign is None:
            value = self._power()
        else:
            inner = self._signed()
            value = (lambda values: -inner(values)) if sign == "-" else inner
        self._depth -= 1
        return value

    def _power(self) -> Node:
        """Parse a power, which binds tighter than a sign before it and is right-associative."""
        base = self._atom()
        if self._take("^") is None:
            return base
        exponent = self._signed()
        return lambda values: math.pow(base(values), exponent(values))

    def _atom(self) -> Node:
        if self._at == len(self._tokens):
            raise FormulaError("ends too early")
        token = self._tokens[self._at]
        self._at += 1
        if token == "(":
            inner = self._sum()
            self._close()
            return inner
        if token[0].isdigit() or token[0] == ".":
            number = float(token)
            return lambda values: number
        if not (token[0].isalpha() or token[0] == "_"):
            raise FormulaError(f"{token!r} is not expected here")
        if self._take("(") is not None:
            return self._call(token)
        if token not in self.names:
            raise FormulaError(f"{token[:60]!r} is no grader; there are {', '.join(sorted(self.names))}")
        self.used.add(token)
        return lambda values: values[token]

    def _call(self, name: str) -> Node:
        if name not in _FUNCTIONS:
            raise FormulaError(f"{name[:60]!r} is no function; there are {', '.join(_FUNCTIONS)}")
        function, count = _FUNCTIONS[name]
        arguments = [self._sum()]
        while self._take(",") is not None:
            arguments.append(self._sum())
        self._close()
        if count is not None and len(arguments) != count:
            raise FormulaError(f"{name} takes {count} argument(s)")
        if count is None and len(arguments) == 1:
            return arguments[0]
        return lambda values: function(*(argument(values) for argument in arguments))

    def _take(self, *expected: str) -> str | None:
        if self._at < len(self._tokens) and self._tokens[self._at] in expected:
            self._at += 1
            return self._tokens[self._at - 1]
        return None

    def _close(self) -> None:
        if self._take(")") is None:
            raise FormulaError("')' is missing")


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise FormulaError(f"{text[at:].strip()[:1]!r} is not expected here")
        tokens.append(match[1] or match[2] or match[3])
        at = match.end()
    return tokens

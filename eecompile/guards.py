"""Guards: conditions on the sizes of a call under which the captured graph is the model.

While a model is traced, Python branches on sizes (`if ids.numel() > 100`) take one side, and torch notes the condition.
Here it is an expression over the names of dynamic sizes, kept as nested tuples (`("<=", ("*", "batch", "seq"), 100)`):
checked at every new shape, printed in words, and saved as JSON.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from eecompile.errors import CaptureError

Size = Callable[[str, int], int | str]  # input (as it is named in the graph) and axis, to the size or its name

BINARY: dict[str, Callable[..., Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod,
    "/": operator.truediv, "**": operator.pow, "<<": operator.lshift, ">>": operator.rshift,
    "&": operator.and_, "|": operator.or_, "^": operator.xor,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
UNARY: dict[str, Callable[..., Any]] = {"-": operator.neg, "not": operator.not_}
CALLS: dict[str, Callable[..., Any]] = {
    "min": min, "max": max, "abs": abs, "int": int, "float": float, "round": round,
    "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "sqrt": math.sqrt, "log": math.log, "log2": math.log2,
    "and": lambda *a: all(a), "or": lambda *a: any(a), "if": lambda test, yes, no: yes if test else no,
}  # fmt: skip
NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_SYNTAX = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%", ast.Div: "/", ast.Pow: "**",
    ast.LShift: "<<", ast.RShift: ">>", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^",
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.USub: "-", ast.Not: "not", ast.And: "and", ast.Or: "or",
}  # fmt: skip


@dataclass(frozen=True)
class Guard:
    """One condition.

    Attributes:
        expression: A number, the name of a size, or `(operator, operand, ...)`.
        where: The line of the model that branches, where it is known.
    """

    expression: Any
    where: str = field(default="", compare=False)

    def holds(self, sizes: Mapping[str, int]) -> bool:
        try:
            return bool(_value(self.expression, sizes))
        except (ZeroDivisionError, ValueError, OverflowError):  # not a condition that these sizes can meet
            return False

    def __str__(self) -> str:
        return _words(self.expression)

    def to_json(self) -> list[Any]:
        """`[expression, where]` as `load_guard` reads it."""
        return [self.expression, self.where]

    @property
    def names(self) -> frozenset[str]:
        """The dynamic sizes that it speaks of."""
        return frozenset(_names(self.expression))

    @property
    def fails_at_one(self) -> bool:
        """Whether it says that one size, or a multiple of it, is not 1."""
        match self.expression:
            case ("!=", str(), 1):
                return True
            case ("!=", ("*", int(factor), str()), int(value)):
                return factor == value
        return False

    @property
    def bound(self) -> tuple[str, int | None, int | None] | None:
        """`(name, low, high)` where it is a range of one size, else None."""
        e = self.expression
        if not isinstance(e, tuple) or e[0] not in FLIPPED or len(e) != 3:
            return None
        op, a, b = e
        if isinstance(a, int) and isinstance(b, str):
            op, a, b = FLIPPED[op], b, a
        if not isinstance(a, str) or not isinstance(b, int):
            return None
        if op in (">", ">="):
            return a, b + (op == ">"), None
        if op == "==":
            return a, b, b
        return (a, None, b - (op == "<")) if op in ("<", "<=") else None


def read_guard(code: str, size: Size, where: str = "") -> Guard | None:
    """A condition as torch writes it (`L['ids'].size()[0]*L['ids'].size()[1] <= 100`); None where it always holds.

    Raises:
        CaptureError: A form that cannot be checked.
    """
    expression = _simple(_parsed(ast.parse(code.strip(), mode="eval").body, size, code))
    guard = Guard(expression, where)
    if not guard.names and guard.holds({}):
        return None
    return guard


@dataclass(frozen=True)
class Number:
    """A number that a model computes from sizes of its inputs and gives out, in the same form."""

    expression: Any

    def value(self, sizes: Mapping[str, int]) -> Any:
        return _value(self.expression, sizes)

    @property
    def is_condition(self) -> bool:
        """Whether it is true or false rather than a number."""
        return isinstance(self.expression, tuple) and self.expression[0] in (*FLIPPED, "not", "and", "or")

    def to_json(self) -> dict[str, Any]:
        return {"of_sizes": self.expression}


def read_number(code: str) -> Number:
    """A number in Python over the names of dynamic sizes, `batch // 2`.

    Raises:
        CaptureError: A form that is not known.
    """
    return Number(_simple(_parsed(ast.parse(code.strip(), mode="eval").body, None, code)))


def load_number(data: Mapping[str, Any]) -> Number:
    """What `Number.to_json` gave."""
    return Number(load_guard([data["of_sizes"], ""]).expression)


def load_guard(data: Any) -> Guard:
    """A condition from JSON.

    Raises:
        ValueError: An operator that is not known.
    """

    def one(e: Any) -> Any:
        if not isinstance(e, list):
            return e
        if not e or not isinstance(e[0], str) or e[0] not in BINARY | UNARY | CALLS:
            raise ValueError(f"a guard with an unknown operator: {e!r}")
        return (e[0], *map(one, e[1:]))

    expression, where = data
    return Guard(one(expression), str(where))


def _parsed(node: ast.AST, size: Size | None, code: str) -> Any:
    def go(n: ast.AST) -> Any:
        return _parsed(n, size, code)

    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _SYNTAX:
        return (_SYNTAX[type(node.op)], go(node.left), go(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SYNTAX:
        return (_SYNTAX[type(node.op)], go(node.operand))
    if isinstance(node, ast.BoolOp):
        return (_SYNTAX[type(node.op)], *map(go, node.values))
    if isinstance(node, ast.IfExp):
        return ("if", go(node.test), go(node.body), go(node.orelse))
    if isinstance(node, ast.Compare) and all(type(o) in _SYNTAX for o in node.ops):
        values = [go(v) for v in (node.left, *node.comparators)]
        pairs = [(_SYNTAX[type(o)], values[i], values[i + 1]) for i, o in enumerate(node.ops)]
        return pairs[0] if len(pairs) == 1 else ("and", *pairs)
    if isinstance(node, ast.Call) and not node.keywords:
        name = ast.unparse(node.func).removeprefix("math.").removeprefix("torch.sym_").removeprefix("torch._sym_")
        if name in CALLS:
            return (name, *map(go, node.args))
    if size is None:
        if isinstance(node, ast.Name):
            return node.id
        raise CaptureError("the model gives out a number that it computes from sizes in a way that is not known", got=code)
    found = re.fullmatch(r"L(\[.+\])\.size\(\)\[(\d+)\]", ast.unparse(node))
    if found is not None:
        return size("_".join(re.findall(r"\w+", found[1])), int(found[2]))
    raise CaptureError(
        "the model branches on sizes by a condition that cannot be checked at a call",
        got=code,
        wanted=f"comparisons of sums, products and quotients, or {', '.join(k for k in CALLS if k.isalnum())}",
        hint="rewrite that branch, or leave that size fixed with dynamic={}",
    )


def _simple(e: Any) -> Any:
    """Negated comparisons turned round, parts without a size evaluated."""
    if not isinstance(e, tuple):
        return e
    e = (e[0], *map(_simple, e[1:]))
    if e[0] == "not" and isinstance(e[1], tuple) and e[1][0] in NEGATED:
        e = (NEGATED[e[1][0]], *e[1][1:])
    if e[0] in ("==", "<=", ">=") and e[1] == e[2]:
        return True
    if not any(True for _ in _names(e)):
        try:
            return _value(e, {})
        except (ZeroDivisionError, ValueError, OverflowError):
            return e
    return e


def _value(e: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(e, str):
        return sizes[e]
    if not isinstance(e, tuple):
        return e
    if e[0] == "if":
        return _value(e[2] if _value(e[1], sizes) else e[3], sizes)
    values = [_value(v, sizes) for v in e[1:]]
    if len(values) == 1 and e[0] in UNARY:
        return UNARY[e[0]](*values)
    return (BINARY[e[0]] if e[0] in BINARY else CALLS[e[0]])(*values)


def _names(e: Any) -> Any:
    if isinstance(e, str):
        yield e
    elif isinstance(e, tuple):
        for v in e[1:]:
            yield from _names(v)


def _words(e: Any, inner: bool = False) -> str:
    if not isinstance(e, tuple):
        return str(e)
    op, *rest = e
    if op == "if":
        test, yes, no = (_words(v, True) for v in rest)
        text = f"{yes} if {test} else {no}"
    elif op in ("and", "or"):
        text = f" {op} ".join(_words(v, True) for v in rest)
    elif len(rest) == 1 and op in UNARY:
        text = f"{op} {_words(rest[0], True)}" if op == "not" else f"-{_words(rest[0], True)}"
    elif op in BINARY:
        text = f" {op} ".join(_words(v, not (_product(v) and (op in FLIPPED or op in "+-*"))) for v in rest)
    else:
        return f"{op}({', '.join(map(_words, rest))})"
    return f"({text})" if inner else text


def _product(e: Any) -> bool:
    return isinstance(e, tuple) and e[0] == "*"

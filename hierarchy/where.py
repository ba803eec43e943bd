"""Which documents a condition over their metadata holds for: `kind == "mail" and year >= 2020`."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from treemem.errors import InputError

Condition = Callable[[Mapping[str, Any]], bool]
"""Tells whether it holds for a document's record: id, title and metadata."""

_HELP = """compare names of metadata (also id, title) with values: == != < <= > >= in, not in, joined by and, or, not"""
_MISSING = object()
_LONGEST = 10_000


def condition(text: str) -> Condition:
    """Read a condition.

    A name stands for what a document's metadata has under it, `id` and `title` for its own; `meta["two words"]` for a
    name that is none in Python. `"x" in tags` holds where a list holds x, or a string holds it as a part. A document
    without the name meets no comparison with it but `!=` and `not in`; neither does one whose value cannot be compared.

    Raises InputError for what is none.
    """
    if len(text) > _LONGEST:
        raise InputError(f"where: a condition of {len(text):,} characters; the longest has {_LONGEST:,}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _truth(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"where = {text[:200]!r}: it cannot be read ({getattr(error, 'msg', error)}); {_HELP}"
        ) from error


def _truth(node: ast.expr) -> Condition:
    if isinstance(node, ast.BoolOp):
        parts = [_truth(value) for value in node.values]
        together = all if isinstance(node.op, ast.And) else any
        return lambda record: together(part(record) for part in parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _truth(node.operand)
        return lambda record: not inner(record)
    if isinstance(node, ast.Compare):
        sides = [_value(side) for side in (node.left, *node.comparators)]
        tests = [_comparison(operator) for operator in node.ops]
        return lambda record: all(
            test(left(record), right(record)) for test, left, right in zip(tests, sides, sides[1:], strict=False)
        )
    if isinstance(node, ast.Name | ast.Subscript | ast.Constant):  # alone: whether it is there, and not empty
        value = _value(node)
        return lambda record: (own := value(record)) is not _MISSING and bool(own)
    raise ValueError(f"{type(node).__name__} is not known here")


def _value(node: ast.expr) -> Callable[[Mapping[str, Any]], Any]:
    if isinstance(node, ast.Constant):
        constant = node.value
        return lambda record: constant
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        if not isinstance(node.operand.value, int | float):
            raise ValueError("a minus stands before numbers alone")
        negative = -node.operand.value
        return lambda record: negative
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        parts = [_value(part) for part in node.elts]
        return lambda record: [part(record) for part in parts]
    if isinstance(node, ast.Name):
        name = node.id
        constants = {"true": True, "false": False, "null": None}
        if name in constants:
            return lambda record: constants[name]
        if name in ("id", "title"):
            return lambda record: record[name]
        return lambda record: record["metadata"].get(name, _MISSING)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        key = node.slice.value
        if isinstance(node.value, ast.Name) and node.value.id == "meta":
            return lambda record: record["metadata"].get(key, _MISSING)
        inner = _value(node.value)
        return lambda record: _inside(inner(record), key)
    raise ValueError(f"{type(node).__name__} is not known here")


def _inside(value: Any, key: Any) -> Any:
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return _MISSING


def _comparison(operator: ast.cmpop) -> Callable[[Any, Any], bool]:
    tests: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
        ast.Eq: lambda a, b: a == b,
        ast.NotEq: lambda a, b: a != b,
        ast.Lt: lambda a, b: a < b,
        ast.LtE: lambda a, b: a <= b,
        ast.Gt: lambda a, b: a > b,
        ast.GtE: lambda a, b: a >= b,
        ast.In: lambda a, b: a in b,
        ast.NotIn: lambda a, b: a not in b,
    }
    if type(operator) not in tests:
        raise ValueError(f"{type(operator).__name__} is not known here; use == for is")
    test = tests[type(operator)]
    negated = isinstance(operator, ast.NotEq | ast.NotIn)

    def compared(left: Any, right: Any) -> bool:
        if left is _MISSING or right is _MISSING:
            return negated
        try:
            return bool(test(left, right))
        except TypeError:
            return negated

    return compared

"""Every public name resolves, is known to type checkers, and says what goes in and what comes out."""

import ast
import dataclasses
import inspect
import re
import types

import pytest

import dualscan
from tests.house.tree import PACKAGE

NAMES = [name for name in dualscan.__all__ if not name.startswith("__")]
# The fixed order of a docstring's sections.
SECTIONS = ["Args", "Attributes", "Returns", "Raises", "Example", "Note"]


def sections(docstring: str) -> dict[str, str]:
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parameters(thing: object) -> list[str]:
    """The names that a caller passes, or the fields of a tuple or dataclass."""
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing)]
    if isinstance(thing, type) and issubclass(thing, tuple):
        return list(getattr(thing, "_fields", ()))
    assert callable(thing)
    catch_all = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return [p.name for p in inspect.signature(thing).parameters.values() if p.kind not in catch_all]


@pytest.mark.parametrize("name", NAMES)
def test_docstring_is_complete(name):
    thing = getattr(dualscan, name)
    found = sections(thing.__doc__ or "")
    assert list(found) == [section for section in SECTIONS if section in found], "sections out of order"
    described = found.get("Args", "") + found.get("Attributes", "")
    missing = [p for p in parameters(thing) if not re.search(rf"^ +[^:]*\b{p}\b[^:]*:", described, flags=re.MULTILINE)]
    assert missing == []
    if isinstance(thing, types.FunctionType):
        assert "Returns" in found


def test_names_are_listed_and_typed():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == dualscan._PUBLIC
    assert set(NAMES) <= set(dir(dualscan))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'dualscan' has no attribute 'ssdd'"):
        _ = dualscan.ssdd

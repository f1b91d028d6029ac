"""The type stubs name what the native module has: the same members, the same parameters with the same kinds and defaults."""

import ast
import inspect
import pathlib

import pytest
import tersor
from tersor import _native

STUBS = ast.parse((pathlib.Path(tersor.__file__).parent / "_native.pyi").read_text())
CLASSES = {node.name: node for node in STUBS.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}
FUNCTIONS = {node.name: node for node in STUBS.body if isinstance(node, ast.FunctionDef)}
METHODS = [(owner, node) for owner, body in CLASSES.items() for node in body.body if isinstance(node, ast.FunctionDef)]

Parameter = tuple[str, str, object]  # name, kind, default


def of_stub(node: ast.FunctionDef) -> list[Parameter]:
    """Parameters without ``self``."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [inspect.Parameter.empty] * (len(positional) - len(arguments.defaults)) + [ast.literal_eval(d) for d in arguments.defaults]
    out = [(a.arg, "positional", default) for a, default in zip(positional, defaults, strict=True) if a.arg != "self"]
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        out.append((a.arg, "keyword", inspect.Parameter.empty if default is None else ast.literal_eval(default)))
    return out


def of_native(function) -> list[Parameter]:
    """Parameters without ``self``."""
    kinds = {inspect.Parameter.KEYWORD_ONLY: "keyword", inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional"}
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return [(p.name, kinds.get(p.kind, p.kind.description), p.default) for p in parameters]


def is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)


def test_functions_have_the_signatures_of_the_stubs():
    native = {name for name, value in vars(_native).items() if not name.startswith("_") and not inspect.isclass(value)}
    assert native == set(FUNCTIONS)
    for name, node in FUNCTIONS.items():
        assert of_native(getattr(_native, name)) == of_stub(node), name


def test_classes_have_the_members_of_the_stubs():
    assert {name for name, value in vars(_native).items() if inspect.isclass(value)} == set(CLASSES)
    for name, body in CLASSES.items():
        native = {member for member in vars(getattr(_native, name)) if not member.startswith("_")}
        assert native == {node.name for node in body.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}, name


@pytest.mark.parametrize(("owner", "node"), METHODS, ids=[f"{owner}.{node.name}" for owner, node in METHODS])
def test_methods_have_the_signatures_of_the_stubs(owner, node):
    cls = getattr(_native, owner)
    if is_property(node):
        assert inspect.isgetsetdescriptor(vars(cls)[node.name])
    elif node.name == "__init__":
        assert of_native(cls) == of_stub(node)
    elif node.name.startswith("__"):
        assert callable(getattr(cls, node.name))  # slots: Python knows no more of them
    else:
        assert of_native(getattr(cls, node.name)) == of_stub(node)


def test_everything_public_has_a_docstring():
    for name in tersor.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(tersor, name)), name

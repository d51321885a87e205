"""The declarations marked `@configurable` in this package, read from the source without importing it.

Importing the stages imports JAX, which takes seconds. So `--help` and the check of a command's arguments read names,
annotations, defaults and docstrings of settings from the syntax tree.
"""

import ast
import contextlib
import functools
import gc
import importlib
import inspect
import operator
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin

from slm_jax import configurable as configurable_lib

PACKAGE = Path(__file__).parent
# Names that annotations may use besides the classes and constants of this package.
_KNOWN: dict[str, Any] = {
    **{kind.__name__: kind for kind in (int, float, str, bool, tuple, dict, Sequence, Mapping)},
    **{"Annotated": typing.Annotated, "Any": typing.Any, "Callable": Callable, "os.PathLike": os.PathLike},
    **{name: value for name, value in vars(configurable_lib).items() if not name.startswith("_")},
}
_OPERATORS = {ast.LShift: operator.lshift, ast.Mult: operator.mul, ast.Pow: operator.pow, ast.Add: operator.add}


class Unreadable(Exception):
    """An expression that cannot be read from the syntax tree."""


class _Source(str):
    """A default that cannot be read from the syntax tree, shown as it is written."""

    __repr__ = str.__str__


@dataclass(frozen=True)
class Declaration:
    """A function or dataclass that gin may bind.

    Attributes:
      name: its name for gin.
      module: the dotted name of its module.
      doc: its docstring.
      signature: parameters with `typing` annotations and default values; a class of this package is represented by an
        empty class of the same name, and an annotation that cannot be read is Any.
      takes_fields_of: the dataclass to which a function passes further settings, if any.
      makes: name of the class that a call returns, or empty if it is not a class of this package.
    """

    name: str
    module: str
    doc: str
    signature: inspect.Signature
    takes_fields_of: "Declaration | None"
    makes: str

    @property
    def selector(self) -> str:
        """Its full name in gin's registry."""
        return f"{self.module}.{self.name}"

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """All settings by name; those that are passed on come last, with the default Ellipsis."""
        own = self.signature.parameters.values()
        found = {p.name: p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD}
        further = self.takes_fields_of.signature.parameters if self.takes_fields_of else {}
        return found | {name: p.replace(default=...) for name, p in further.items() if name not in found}


class _Module:
    """The top level of a module of this package: name -> syntax tree."""

    def __init__(self, name: str):
        parts = name.split(".")[1:]
        path = PACKAGE.joinpath(*parts).with_suffix(".py")
        tree = ast.parse((path if path.is_file() else PACKAGE.joinpath(*parts, "__init__.py")).read_bytes())
        self.name, self.nodes = name, dict[str, ast.AST]()
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.nodes[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                self.nodes[node.target.id] = node.value
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.nodes[node.name] = node
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "slm_jax":
                self.nodes.update({alias.asname or alias.name: node for alias in node.names})


_module = functools.cache(_Module)


@functools.cache
def _class(name: str) -> type:
    return type(name, (), {})


def _value(node: ast.AST | None, module: _Module) -> Any:
    """The value of an expression: a constant, or an annotation. A dictionary has its keys, with values None."""
    read = functools.partial(_value, module=module)
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return _named(name, module)
        case ast.Attribute(value=ast.Name(id=owner), attr=name) if isinstance(module.nodes.get(owner), ast.ImportFrom):
            source = typing.cast(ast.ImportFrom, module.nodes[owner])
            return _named(name, _module(f"{source.module}.{owner}"))
        case ast.Attribute():
            return _KNOWN.get(ast.unparse(node)) or _class(node.attr)
        case ast.Tuple(elts=items) | ast.List(elts=items):
            spread = [read(i.value) if isinstance(i, ast.Starred) else [read(i)] for i in items]
            found = [value for values in spread for value in values]
            return found if isinstance(node, ast.List) else tuple(found)
        case ast.Dict(keys=keys):
            return dict.fromkeys(read(key) for key in keys if key)
        case ast.Subscript(value=owner, slice=index):
            return read(owner)[read(index)]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return read(left) | read(right)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](read(left), read(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -read(operand)
        case ast.Call(func=ast.Name(id=name), args=arguments) if name in _KNOWN:
            return _KNOWN[name](*map(read, arguments))
    raise Unreadable(ast.unparse(node) if node else "no annotation")


def _named(name: str, module: _Module) -> Any:
    """The value of a name at the top level of a module."""
    node = module.nodes.get(name)
    if name in _KNOWN and (node is None or isinstance(node, ast.ImportFrom)):
        return _KNOWN[name]
    if isinstance(node, ast.ImportFrom):
        return _named(
            next(alias.name for alias in node.names if name in (alias.asname, alias.name)), _module(node.module)
        )
    return _class(name) if node is None or isinstance(node, ast.ClassDef | ast.FunctionDef) else _value(node, module)


def _declaration(name: str, node: ast.ClassDef | ast.FunctionDef, module: _Module, passes_on: bool) -> Declaration:
    parameters, makes = list(_parameters(node, module)), node.name
    if isinstance(node, ast.FunctionDef):
        made = module.nodes.get(makes := node.returns.id if isinstance(node.returns, ast.Name) else "")
        makes = makes if isinstance(made, ast.ClassDef | ast.ImportFrom) else ""
    owner = _declaration(makes, typing.cast(ast.ClassDef, module.nodes[makes]), module, False) if passes_on else None
    doc = ast.get_docstring(node) or ""
    return Declaration(name, module.name, doc, inspect.Signature(parameters), owner, makes)


def _parameters(node: ast.ClassDef | ast.FunctionDef, module: _Module) -> Iterator[inspect.Parameter]:
    if isinstance(node, ast.ClassDef):
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        declared = [(field.target.id, field.annotation, field.value) for field in fields]  # pyright: ignore[reportAttributeAccessIssue]
        further = None
    else:
        arguments, further = node.args.args, node.args.kwarg
        defaults = [None] * (len(arguments) - len(node.args.defaults)) + node.args.defaults
        declared = [(a.arg, a.annotation, default) for a, default in zip(arguments, defaults, strict=True)]
    for name, annotation, default in declared:
        value, takes = inspect.Parameter.empty, typing.Any
        with contextlib.suppress(Unreadable):
            takes = _value(annotation, module)
        try:
            value = value if default is None else _value(default, module)
        except Unreadable as unreadable:
            is_factory = str(unreadable).partition("(")[0].endswith("field")
            value = _Source("<factory>" if is_factory else unreadable)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        yield inspect.Parameter(name, kind, default=value, annotation=takes)
    if further:
        yield inspect.Parameter(further.arg, inspect.Parameter.VAR_KEYWORD)


@functools.cache
def declarations() -> dict[str, Declaration]:
    """Name -> declaration, for everything in this package that gin may bind."""
    collects = gc.isenabled()
    gc.disable()  # syntax trees are many objects without cycles: the collector would take a third of the time
    try:
        return _declarations()
    finally:
        if collects:
            gc.enable()


def _declarations() -> dict[str, Declaration]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "\n@configurable" not in path.read_text(encoding="utf-8"):
            continue
        module = _module(".".join(("slm_jax", *path.relative_to(PACKAGE).with_suffix("").parts)))
        for node in module.nodes.values():
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                call = mark if isinstance(mark, ast.Call) else None
                if isinstance(target := call.func if call else mark, ast.Name) and target.id == "configurable":
                    name = str(typing.cast(ast.Constant, call.args[0]).value) if call else node.name
                    found[name] = _declaration(name, node, module, passes_on=bool(call and call.keywords))
    return found


def table(name: str, module: str) -> tuple[Any, ...]:
    """The items or keys of a module's constant; empty if they cannot be read from the source."""
    node = _module(module).nodes.get(name)
    try:
        value = None if node is None else _named(name, _module(module))
    except Unreadable:
        return ()
    return tuple(value) if isinstance(value, tuple | list | dict) else ()


def register() -> None:
    """Registers every declaration whose module is not imported with gin; the first call imports the module.

    gin can then read settings without importing a module of the package. Importing the module replaces the entry
    (configurable.py), and existing bindings apply to it.
    """
    registry = gin.config._REGISTRY  # pyright: ignore[reportAttributeAccessIssue]
    for declaration in declarations().values():
        if declaration.selector not in registry:
            lazy = _imported_at_call(declaration)
            allowed = list(declaration.parameters) if declaration.takes_fields_of else None
            registry[declaration.selector] = gin.config.Configurable(  # pyright: ignore[reportAttributeAccessIssue]
                lazy, lazy, declaration.name, declaration.module, None, allowed, None, declaration.selector
            )


def _imported_at_call(declaration: Declaration) -> Callable[..., Any]:
    def lazy(*positional: Any, **named: Any) -> Any:
        return imported(declaration.name)(*positional, **named)

    lazy.__name__, lazy.__module__, lazy.__doc__ = declaration.name, declaration.module, declaration.doc
    lazy.__signature__ = declaration.signature  # pyright: ignore[reportFunctionMemberAccess] (gin reads it)
    return lazy


def imported(name: str) -> Callable[..., Any]:
    """The function or class itself, as gin calls it, after importing its module."""
    declaration = declarations()[name]
    importlib.import_module(declaration.module)
    return gin.get_configurable(declaration.selector)

"""`@configurable`: a stage or dataclass whose settings gin may bind, and which checks them, whoever calls it.

Annotations say what a setting takes: `int`, `str | None`, `Sequence[Phase]`, and with `Annotated` also its range or its
choices: `Annotated[float, Above(0), Below(1)]`, `Annotated[str, OneOf(SCORES)]`. `--help` and the settings page read
the same annotations.
"""

import functools
import importlib
import inspect
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import gin

from slm_jax.errors import UserError

Made = TypeVar("Made", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Limit:
    limit: float
    code: ClassVar[str] = "setting-out-of-range"
    compare: ClassVar[Callable[[Any, Any], bool]]
    words: ClassVar[str]

    def admits(self, value: Any) -> bool:
        return type(self).compare(value, self.limit)

    def __str__(self) -> str:
        return f"{self.words} {self.limit}"


class AtLeast(_Limit):
    compare, words = operator.ge, "at least"


class Above(_Limit):
    compare, words = operator.gt, "above"


class AtMost(_Limit):
    compare, words = operator.le, "at most"


class Below(_Limit):
    compare, words = operator.lt, "below"


class OneOf:
    """The choices of a setting: a list of names, or the keys of a table."""

    code = "setting-unknown-value"

    def __init__(self, choices: Iterable[Any]):
        self.choices = tuple(choices)

    def admits(self, value: Any) -> bool:
        return value in self.choices

    def __str__(self) -> str:
        return "one of " + ", ".join(map(repr, self.choices))


Natural = Annotated[int, AtLeast(0)]
Count = Annotated[int, AtLeast(1)]
Seed = Annotated[int, AtLeast(0), Below(2**32)]
Positive = Annotated[float, Above(0)]
NotNegative = Annotated[float, AtLeast(0)]
Share = Annotated[float, AtLeast(0), AtMost(1)]
PositiveShare = Annotated[float, Above(0), AtMost(1)]
_WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False", type(None): "None"}
_UNIONS = (typing.Union, types.UnionType)


@typing.overload
def configurable(target: str, allowlist: Sequence[str] | None = None) -> Callable[[Made], Made]: ...
@typing.overload
def configurable(target: Made) -> Made: ...
def configurable(target: Any, allowlist: Sequence[str] | None = None) -> Any:
    """Decorates a function or dataclass that gin may bind by its name, or by the name given."""
    if not isinstance(target, str):
        return configurable(target.__name__)(target)

    def register(made: Any) -> Any:
        # declarations.py has registered it if settings were read before this module was imported.
        gin.config._REGISTRY._selector_map.pop(f"{made.__module__}.{target}", None)  # pyright: ignore[reportAttributeAccessIssue]
        with gin.unlock_config():
            decorate: Any = gin.configurable(target, allowlist=allowlist)  # whose annotation takes no name
            return decorate(checked(target)(made))

    return register


def checked(owner: str) -> Callable[[Made], Made]:
    """Decorates a function or dataclass with a check of its arguments, which messages name `OWNER.ARGUMENT`.

    A call raises UserError with the code `setting-type`, `setting-out-of-range`, `setting-unknown-value`, or
    `setting-empty` where a text is required.
    """

    def decorate(target: Made) -> Made:
        call = target.__init__ if inspect.isclass(target) else target
        signature = inspect.signature(call)
        takes = functools.cache(lambda: typing.get_type_hints(target, include_extras=True))

        @functools.wraps(call)
        def check_and_call(*positional: Any, **named: Any) -> Any:
            try:
                given = signature.bind_partial(*positional, **named)
            except TypeError:  # Python's own message names an unknown argument
                return call(*positional, **named)
            for name, value in given.arguments.items():
                if name in takes() and signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                    given.arguments[name] = fit(value, takes()[name], f"{owner}.{name}")
                    if value == "" and signature.parameters[name].default is inspect.Parameter.empty:
                        raise UserError("setting-empty", f"{owner}.{name} is '': it takes a text that is not empty")
            return call(*given.args, **given.kwargs)

        check_and_call.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue] (gin reads no other)
        if not inspect.isclass(target):
            return typing.cast(Made, check_and_call)
        target.__init__ = check_and_call
        return typing.cast(Made, target)

    return decorate


def fit(value: Any, annotation: Any, name: str) -> Any:
    """The value, as a tuple where a sequence is meant, of which one item may be given without brackets.

    Raises:
      UserError: the value does not fit; `name` is the setting.
    """
    try:
        return _fit(value, annotation)
    except _Unfit as unfit:
        takes = takes_text(annotation) + (", with brackets: @NAME()" if callable(value) else "")
        shown = repr(value) if len(repr(value)) < 200 else repr(value)[:200] + "..."
        raise UserError(unfit.code, f"{name} is {shown}: it takes {takes}") from None


def fit_settings(owner: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What gin binds for a configurable that is not called, checked as if it were."""
    importlib.import_module(gin.config._REGISTRY.get_match(owner).module)  # pyright: ignore[reportAttributeAccessIssue]
    takes = typing.get_type_hints(gin.get_configurable(owner), include_extras=True)
    return {name: fit(value, takes[name], f"{owner}.{name}") for name, value in settings.items()}


class _Unfit(Exception):
    def __init__(self, code: str = "setting-type"):
        self.code = code


def _fit(value: Any, annotation: Any) -> Any:
    kind, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is Any:
        return value
    if kind is Annotated:
        value = _fit(value, arguments[0])
        for mark in arguments[1:]:
            if not mark.admits(value):
                raise _Unfit(mark.code)
    elif kind in _UNIONS:
        # The value may be of the right type and out of range: that says more than the types that it is not.
        codes = set()
        for argument in arguments:
            try:
                return _fit(value, argument)
            except _Unfit as unfit:
                codes.add(unfit.code)
        raise _Unfit(min(codes - {"setting-type"}, default="setting-type"))
    elif kind in (Sequence, tuple):
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(_fit(item, arguments[0]) for item in items)
    elif kind in (Mapping, dict):
        if not isinstance(value, kind):
            raise _Unfit
        for key, item in value.items():
            _fit(key, arguments[0])
            _fit(item, arguments[1])
    elif kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
            raise _Unfit
        if not math.isfinite(value):
            raise _Unfit("setting-out-of-range")
    elif isinstance(kind, type) and (isinstance(value, type) or not isinstance(value, kind)):
        raise _Unfit
    return value


def takes_text(annotation: Any) -> str:
    """What an annotation takes, in words."""
    kind, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is Annotated:
        marks = [str(mark) for mark in arguments[1:]]
        choices = any(isinstance(mark, OneOf) for mark in arguments[1:])
        return " and ".join(marks) if choices else f"{takes_text(arguments[0])}, {' and '.join(marks)}"
    if kind in _UNIONS:
        return ", or ".join(takes_text(argument) for argument in arguments)
    if kind in (Sequence, tuple):
        return f"a list, each item {takes_text(arguments[0])}"
    if kind in (Mapping, dict):
        return "a dictionary, {key: value}"
    name = getattr(kind, "__name__", str(kind))
    return _WORDS.get(kind, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")


def marks(annotation: Any) -> list[Any]:
    """The ranges and choices that an annotation names, in lists and alternatives too."""
    found = list(getattr(annotation, "__metadata__", ()))
    return found + [mark for argument in typing.get_args(annotation) for mark in marks(argument)]


def without_marks(annotation: Any) -> Any:
    """An annotation without ranges and choices: `int | None` for `Annotated[int, AtLeast(1)] | None`."""
    kind, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is Annotated:
        return without_marks(arguments[0])
    return functools.reduce(operator.or_, map(without_marks, arguments)) if kind in _UNIONS else annotation

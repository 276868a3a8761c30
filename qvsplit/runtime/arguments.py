"""Refuse arguments of the public API in one sentence: which argument, what is wanted, and what was given.

Options that the command line has too are named in backquotes: commands/wording.py makes flags of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from os import PathLike
from typing import Any, TypeVar

from qvsplit.errors import UsageError

T = TypeVar("T")
_LONGEST = 60  # characters of a value in a message


def wrong(name: str, given: object, wanted: str) -> UsageError:
    """Give the error for an argument of the wrong type."""
    return UsageError(f"{name}: give {wanted}, not {described(given)}")


def described(given: object) -> str:
    """Name a value in a sentence: `int 5`, `str 'a.jpg'`, `None`, `a list`, `an Answer`, `the class dict`."""
    if given is None or isinstance(given, bool):
        return repr(given)
    if isinstance(given, type):
        return f"the class {given.__name__}"
    name = type(given).__name__
    if isinstance(given, str | bytes | int | float | PathLike):
        text = repr(str(given)) if isinstance(given, PathLike) else repr(given)
        return f"{name} {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}"
    return f"{'an' if name[:1].lower() in set('aeiou') else 'a'} {name}"


def instance_of(name: str, given: object, kind: type[T], wanted: str) -> T:
    """Give `given` if it is a `kind`. UsageError if not."""
    if not isinstance(given, kind):
        raise wrong(name, given, wanted)
    return given


def a_path(name: str, given: object, wanted: str = "a path") -> str:
    """Give a path, or a checkpoint's name, as text. UsageError for anything else, and for an empty one."""
    if isinstance(given, PathLike):
        given = given.__fspath__()
    if not isinstance(given, str):
        raise wrong(name, given, wanted)
    if not given.strip():
        raise UsageError(f"{name}: give {wanted}, not an empty text")
    return given


def paths(name: str, given: object, wanted: str = "a path or several") -> list[str]:
    """Give one path or several as a list that is not empty. UsageError for anything else."""
    if isinstance(given, str | PathLike):
        return [a_path(name, given, wanted)]
    if not isinstance(given, Iterable) or isinstance(given, bytes | Mapping):
        raise wrong(name, given, wanted)
    listed = [a_path(f"{name}[{number}]", one) for number, one in enumerate(given)]
    if not listed:
        raise UsageError(f"{name}: give {wanted}, not none")
    return listed


def check_number(name: str, given: object, *, least: float | None = None, whole: bool = True) -> None:
    """UsageError for what is not a number, is not finite, or is below `least`."""
    if isinstance(given, bool) or not isinstance(given, Integral if whole else Real):
        raise wrong(name, given, "a whole number" if whole else "a number")
    if not math.isfinite(given):
        raise UsageError(f"`{name}` must be finite, not {given}")
    if least is not None and given < least:
        raise UsageError(f"`{name}` must be at least {least}, not {given}")


def check_texts(name: str, given: Mapping[str, Any]) -> None:
    """UsageError for an option that is neither None nor a text. `given`: the options by name."""
    for option, value in given.items():
        if value is not None and not isinstance(value, str):
            raise wrong(option, value, name)


def check_flags(given: Mapping[str, Any]) -> None:
    """UsageError for an option that is neither True nor False."""
    for option, value in given.items():
        if not isinstance(value, bool):
            raise wrong(option, value, "True or False")


def check_one_of(name: str, given: object, known: Collection[str]) -> None:
    """UsageError for a text that is none of the known ones."""
    if given not in known:
        raise UsageError(f"`{name}` {given}: choose one of {', '.join(known)}")

"""The shapes in signatures are checked at each function's first calls in every test.

Checks of all calls take twice as long as small models themselves do, and what has had the right shapes so often seldom has
wrong ones later in the same test.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jaxtyping

CHECKED_CALLS = 8
_calls: Counter[Any] = Counter()
_jaxtyped = jaxtyping.jaxtyped


def install(modules: Sequence[str]) -> None:
    """Check the functions and dataclasses of these modules, which nobody has imported yet."""
    jaxtyping.jaxtyped = lambda *, typechecker: functools.partial(_checked_at_first, typechecker=typechecker)
    jaxtyping.install_import_hook(modules, "beartype.beartype")


def begin_test() -> None:
    _calls.clear()


def _checked_at_first(function: Any, *, typechecker: Any) -> Any:
    """What the import hook puts around functions, and around the ``__init__`` of dataclasses."""
    if inspect.isclass(function):
        plain = function.__init__
        _jaxtyped(function, typechecker=typechecker)
        if function.__init__ is not plain:
            function.__init__ = _at_first(function.__init__, plain)
        return function
    return _at_first(_jaxtyped(function, typechecker=typechecker), function)


def _at_first(checked: Any, plain: Any) -> Any:
    @functools.wraps(plain)
    def called(*arguments: Any, **named: Any) -> Any:
        _calls[plain] += 1
        return (checked if _calls[plain] <= CHECKED_CALLS else plain)(*arguments, **named)

    return called

"""The shapes in signatures are checked at each function's first calls in every test, and at every 32nd from then on.

Checks of all calls take twice as long as small models themselves do.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jaxtyping

FIRST_CALLS, EVERY = 8, 32
_calls: Counter[Any] = Counter()
_jaxtyped = jaxtyping.jaxtyped


def install(modules: Sequence[str]) -> None:
    """Check the functions and dataclasses of these modules, which nobody has imported yet."""
    jaxtyping.jaxtyped = lambda *, typechecker: functools.partial(_checked, typechecker=typechecker)
    jaxtyping.install_import_hook(modules, "beartype.beartype")


def begin_test() -> None:
    _calls.clear()


def _checked(function: Any, *, typechecker: Any) -> Any:
    """What the import hook puts around functions, and around the ``__init__`` of dataclasses."""
    if inspect.isclass(function):
        plain = function.__init__
        _jaxtyped(function, typechecker=typechecker)
        if function.__init__ is not plain:
            function.__init__ = _sometimes(function.__init__, plain)
        return function
    return _sometimes(_jaxtyped(function, typechecker=typechecker), function)


def _sometimes(checked: Any, plain: Any) -> Any:
    @functools.wraps(plain)
    def called(*arguments: Any, **named: Any) -> Any:
        _calls[plain] = number = _calls[plain] + 1
        return (checked if number <= FIRST_CALLS or number % EVERY == 0 else plain)(*arguments, **named)

    return called

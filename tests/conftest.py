"""Shapes are checked at every call in tests: the types in blt.shapes are the specification."""

import jaxtyping

_hook = jaxtyping.install_import_hook("blt", "beartype.beartype")

"""Shapes are checked at every call in tests: the types in blt.shapes are the specification.

Configs and flops hold no tensors, and pydantic checks its own.
"""

import jaxtyping

_WITH_TENSORS = ("byte_ids", "corpus", "evaluate", "generate", "language_model", "model", "train")
jaxtyping.install_import_hook([f"blt.{module}" for module in _WITH_TENSORS], "beartype.beartype")

"""Byte Latent Transformers: language models that read and write raw bytes, in patches they choose themselves."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ByteStreamer", "LanguageModel", "TrainerModel", "fast_generate", "load"]

if TYPE_CHECKING:
    from blt.huggingface_generate import ByteStreamer, fast_generate
    from blt.huggingface_trainer import TrainerModel
    from blt.language_model import LanguageModel, load


def __getattr__(name: str) -> Any:
    """The public names, imported when first used, so that ``blt --help`` need not wait for torch."""
    if name in __all__:
        from blt import huggingface_generate, huggingface_trainer, language_model

        homes = {"LanguageModel": language_model, "load": language_model, "TrainerModel": huggingface_trainer}
        return getattr(homes.get(name, huggingface_generate), name)
    raise AttributeError(f"module 'blt' has no attribute {name!r}")

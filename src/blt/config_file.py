"""TOML -> a run's config, and back. Defaults < file < ``--set``."""

import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from blt.config import NETWORK_SECTIONS, Config, ModelConfig, RunConfig, validated


def preset_names() -> list[str]:
    """The presets that ship with the package, by name."""
    return sorted(entry.name.removesuffix(".toml") for entry in _preset_folder().iterdir())


def read_run_config(source: str | Path, overrides: Iterable[str] = (), init: ModelConfig | None = None) -> RunConfig:
    """A run config from a TOML file or a preset's name; ``overrides`` are ``section.key=value`` in TOML's notation.

    ``init``: the config of the model that the run goes on from. It is the run's [model]; one that the file has, too, must
    describe the same networks. What the file says of making an entropy model is left out where that model has one.

    Raises ValueError naming the file and the key, FileNotFoundError for a missing file.
    """
    path = Path(source)
    if not path.is_file():
        preset = _preset_folder() / f"{source}.toml"
        if not preset.is_file():
            raise FileNotFoundError(
                f"no config file {source}; give a .toml file or a preset: {', '.join(preset_names())}"
            )
        content = preset.read_bytes()
    else:
        content = path.read_bytes()
    try:
        values = tomllib.loads(content.decode("utf-8-sig"))  # Windows' editors write a BOM
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not TOML: {error}") from None
    if init is not None:
        _go_on_from(values, init, str(source))
    for override in overrides:
        _apply_override(values, override)
    if "model" not in values:
        raise ValueError(f"{source} has no [model]; add one, or name a model to go on from (--init MODEL)")
    return validated(RunConfig, values, str(source))


def _go_on_from(values: dict[str, Any], init: ModelConfig, origin: str) -> None:
    """Make ``init`` the [model] of a file's values."""
    described = values.get("model")
    if described is not None:
        own = validated(ModelConfig, described, f"{origin}, model").without_threshold()
        differing = [
            name
            for name in (*NETWORK_SECTIONS, "max_bytes", "patching")
            if getattr(own, name) != getattr(init.without_threshold(), name) and name in described
        ]
        if differing:
            raise ValueError(
                f"{origin}: model.{differing[0]} is {getattr(own, differing[0])!r}, and that of the model to go on from is "
                f"{getattr(init, differing[0])!r}; leave [model] out, or take a config without one, such as finetune"
            )
    values["model"] = init.model_dump(exclude_none=True)
    if init.patching.threshold_nats is not None or not init.patching.uses_entropies:
        for name in ("entropy_training", "pretrained_entropy_model", "entropy_teacher"):
            values.pop(name, None)


def to_toml(config: Config) -> str:
    """The config as TOML, absent values left out; ``read_run_config`` reads it back equal."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"--set wants section.key=value, got {override!r}")
    *sections, name = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {section} is not a section")
    if text.strip().lower() == "none":
        values.pop(name, None)
        return
    try:
        values[name] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[name] = text  # a bare word is a string


def _preset_folder() -> Any:
    return resources.files("blt") / "configs"

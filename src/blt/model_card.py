"""What is known of a model besides its numbers: licence, source, training, measured figures; as the README.md of its folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blt.config import ModelConfig
from blt.flops import parameter_counts

CARD = "README.md"
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
OWN_KEY = "blt"  # of what only we read in the front matter
METRICS = ("bits_per_byte", "mean_patch_bytes", "gzip_bits_per_byte", "xz_bits_per_byte", "bytes")


@dataclass(frozen=True)
class ModelCard:
    """Absent means nobody said: no licence is claimed for a model that comes without one."""

    license: str | None = None  # as the hub names it: apache-2.0, cc-by-nc-4.0, other
    license_name: str | None = None  # of one that the hub has no name for
    license_link: str | None = None
    license_text: str | None = None  # the LICENSE file that came with the model
    source: str | None = None  # of the model that this one was converted or trained from: a hub id, or a folder's name
    training: str | None = None  # what follows "Trained": on what, how long, where
    figures: tuple[dict[str, Any], ...] = ()  # what evaluation found on each text: its name under "text", and METRICS

    @property
    def license_line(self) -> str | None:
        """The licence in a few words, if there is one."""
        first = next((line.strip(" #*") for line in (self.license_text or "").splitlines() if line.strip(" #*")), None)
        named = self.license_name or (self.license if self.license != "other" else None) or first or self.license
        link = f" ({self.license_link})" if named and self.license_link else ""
        return f"{named}{link}" if named else None


def read_card(folder: Path, hub_id: str | None = None) -> ModelCard:
    """The card of a model's folder; one that is absent or damaged says nothing. ``hub_id``: where the folder is from."""
    from huggingface_hub import metadata_load

    front: Any = None
    try:
        if (folder / CARD).is_file():
            front = metadata_load(folder / CARD)
    except Exception:  # of YAML, of text, of their own: a card keeps no model from being loaded
        front = None
    front = front if isinstance(front, dict) else {}
    ours = front.get(OWN_KEY) if isinstance(front.get(OWN_KEY), dict) else {}
    license_file = next((folder / name for name in LICENSE_FILES if (folder / name).is_file()), None)
    return ModelCard(
        **{key: _text(front.get(key)) for key in ("license", "license_name", "license_link")},
        license_text=license_file.read_text("utf-8", "replace") if license_file else None,
        source=hub_id or _text(front.get("base_model")) or _text(ours.get("source")),
        training=_text(ours.get("training")),
        figures=tuple(figure for figure in _list(ours.get("figures")) if isinstance(figure, dict)),
    )


def with_figures(card: ModelCard, evaluation: Mapping[str, Any], training: str) -> ModelCard:
    """The card with what ``evaluate.evaluate_inputs`` found, in place of what it said before."""
    figures = [
        {"text": text} | {metric: found[metric] for metric in METRICS if found.get(metric) is not None}
        for text, found in evaluation["files"].items()
    ]
    return replace(card, training=training, figures=tuple(figures))


def card_files(card: ModelCard, config: ModelConfig, inexpressible: list[str]) -> dict[str, str]:
    """README.md, and LICENSE where the model came with one. ``inexpressible``: why transformers cannot load the model."""
    from huggingface_hub.utils import yaml_dump

    loads_there = not inexpressible
    front: dict[str, Any] = {
        "license": card.license,
        "license_name": card.license_name,
        "license_link": card.license_link,
        "base_model": card.source if card.source and "/" in card.source else None,
        "library_name": "transformers" if loads_there else "blt",
        "pipeline_tag": "text-generation",
        "tags": ["byte-latent-transformer", "bytes"],
        OWN_KEY: {
            key: value
            for key, value in (("source", card.source), ("training", card.training), ("figures", [*card.figures]))
            if value
        },
    }
    front = {key: value for key, value in front.items() if value}
    parts = [
        f"---\n{yaml_dump(front, sort_keys=False)}---\n",
        "# A Byte Latent Transformer\n",
        "A language model that reads and writes raw bytes, in patches of its own choice "
        "([arXiv 2412.09871](https://arxiv.org/abs/2412.09871)).\n",
        _shape(config),
        _origin(card),
        _figures(card),
        _how_to_load(inexpressible),
    ]
    files = {CARD: "\n".join(part for part in parts if part)}
    return files | ({LICENSE_FILES[0]: card.license_text} if card.license_text else {})


def _shape(config: ModelConfig) -> str:
    counts, patching = parameter_counts(config), config.patching
    rule = f"rule `{patching.rule}`"
    if patching.threshold_nats is not None:
        rule += f", threshold {patching.threshold_nats:.6g} nats"
    if patching.patch_bytes is not None:
        rule += f", {patching.patch_bytes} bytes each"
    if patching.max_patch_bytes is not None:
        rule += f", at most {patching.max_patch_bytes} bytes"
    entropy_model = "no entropy model"
    if config.entropy_model is not None:
        kind = "n-gram tables" if config.entropy_model.kind == "ngram" else "a transformer"
        entropy_model = f"entropies from {kind} ({counts['entropy_model']:,} more)"
    return (
        f"- Parameters: {counts['network']:,}, of which {counts['hash_tables']:,} are table rows that are looked up; "
        f"{entropy_model}.\n- Patches: {rule}.\n- Text of up to {config.max_bytes - 1:,} bytes.\n"
    )


def _origin(card: ModelCard) -> str:
    lines = [f"Trained {card.training}.\n"] if card.training else []
    if card.source:
        on_hub = "/" in card.source
        lines.append(f"From {f'[{card.source}](https://huggingface.co/{card.source})' if on_hub else card.source}.\n")
    licence = card.license_line
    lines.append(f"Licence: {licence}.\n" if licence else "Licence: none was given with this model.\n")
    return "\n".join(lines)


def _figures(card: ModelCard) -> str:
    if not card.figures:
        return ""
    head = "| text | bytes | bits per byte | gzip -9 | xz -9e | bytes per patch |\n|---|---|---|---|---|---|\n"

    def row(figure: dict[str, Any]) -> str:
        cells = [str(figure.get("text", "")), f"{figure['bytes']:,}" if "bytes" in figure else ""]
        for metric in ("bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte", "mean_patch_bytes"):
            cells.append(f"{figure[metric]:.3f}" if isinstance(figure.get(metric), int | float) else "")
        return "| " + " | ".join(cells) + " |\n"

    return (
        "Measured by `blt evaluate`; the compressors get all of a text in one stream:\n\n"
        + head
        + "".join(map(row, card.figures))
    )


def _how_to_load(inexpressible: list[str]) -> str:
    ours = '```python\nimport blt  # pip install blt-lm\n\nprint(blt.load("FOLDER").generate("Once", max_bytes=100))\n```\n'
    if inexpressible:
        return (
            f"{ours}\n`transformers` refuses this model, as its BLT class cannot compute: {'; '.join(inexpressible)}.\n"
        )
    return (
        f"{ours}\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model, tokenizer = (kind.from_pretrained("FOLDER") for kind in (AutoModelForCausalLM, AutoTokenizer))\n'
        'ids = tokenizer("Once", return_tensors="pt").input_ids\n'
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=100, use_cache=False)[0], skip_special_tokens=True))\n```\n"
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []

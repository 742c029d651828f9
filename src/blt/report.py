"""Pictures: entropies and patches of a text (the paper's figure 4), training curves, and a run's report.html."""

import html
import importlib.util
import io
import json
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blt.byte_ids import as_bytes
from blt.checkpoint import write_whole
from blt.language_model import LanguageModel, Text
from blt.optimise import Metrics

BARS = " ▁▂▃▄▅▆▇█"
BAR_NATS = 5.0  # entropies from here on fill a bar


@dataclass(frozen=True)
class PatchedText:
    """A text as the model cuts it: one entry per byte, BOS left out."""

    data: bytes
    starts: list[bool]
    entropies_nats: list[float] | None  # None: the model has no entropy model
    threshold_nats: float | None

    @property
    def patches(self) -> list[bytes]:
        starts = [index for index, start in enumerate(self.starts) if start]
        return [self.data[a:b] for a, b in zip(starts, [*starts[1:], len(self.data)], strict=True)]

    @property
    def mean_patch_bytes(self) -> float:
        return len(self.data) / len(self.patches)

    def as_json(self) -> dict[str, Any]:
        """The keys of ``blt patch --json``."""
        return {
            "patches": [patch.hex() for patch in self.patches],
            "entropies_nats": self.entropies_nats,
            "threshold_nats": self.threshold_nats,
        }


def patched_text(lm: LanguageModel, text: Text) -> PatchedText:
    """Patches and entropies of a text. Raises ValueError where it is beyond the model's limit."""
    data = as_bytes(text)
    ids = lm.encode(data)
    starts = lm.patch_starts(ids)[0, 1:-1].tolist()
    entropies = None if lm.entropy_model is None else lm.entropies(ids)[0, 1:-1].tolist()
    return PatchedText(data, starts, entropies, lm.config.patching.threshold_nats)


def visible_bytes(data: bytes) -> list[str]:
    """One printable character of width 1 for each byte; a character of several bytes stands at its first.

    >>> visible_bytes("é\\n a".encode() + b"\\xff")
    ['é', '·', '⏎', ' ', 'a', '�']
    """
    cells: list[str] = []
    for character in data.decode("utf-8", "surrogateescape"):
        if "\udc80" <= character <= "\udcff":
            cells.append("�")
            continue
        size = len(character.encode())
        special = {"\n": "⏎", "\t": "⇥"}
        # marks take no column of a terminal, wide characters take two
        one_column = unicodedata.category(character)[0] != "M" and unicodedata.east_asian_width(character) not in "WF"
        shown = special.get(character, character if character.isprintable() and one_column else "▯")
        cells += [shown, *("·" * (size - 1))]
    return cells


def terminal_lines(text: PatchedText, columns: int) -> Iterator[str]:
    """Pairs of lines: the bytes with ``|`` where patches start, and under each byte its entropy as a bar."""
    above, below = "", ""
    for index, cell in enumerate(visible_bytes(text.data)):
        bar = " "
        if text.entropies_nats is not None:
            full = min(text.entropies_nats[index] / BAR_NATS, 1.0)
            bar = BARS[round(full * (len(BARS) - 1))]
        if text.starts[index]:
            above, below = above + "|", below + " "
        above, below = above + cell, below + bar
        if len(above) >= columns - 1 or index == len(text.data) - 1:
            yield above
            yield below.rstrip()
            above, below = "", ""


def save_picture(text: PatchedText, path: Path) -> None:
    """Write the picture as .svg, .png (both need matplotlib), .html or .json. Raises ValueError for other endings."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        write_whole(path, json.dumps(text.as_json()) + "\n")
    elif suffix == ".html":
        write_whole(path, _page("patches", _patches_as_html(text)))
    elif suffix in (".svg", ".png"):
        write_whole(path, _figure_bytes(_entropy_figure(text), suffix[1:]))
    else:
        raise ValueError(f"cannot draw {path}: the name must end in .svg, .png, .html or .json")


def write_report(run: Path, text: PatchedText, evaluation: dict[str, Any] | None) -> None:
    """RUN/report.html: curves, figures, samples and the patch picture in one page without outside links."""
    reports = Metrics(run / "metrics.jsonl").read()
    samples = [report for report in reports if "sample" in report]
    parts = [f"<h1>{html.escape(run.name)}</h1>", _svg(_curves(reports))]
    if evaluation is not None:
        rows = {name: value for name, value in evaluation.items() if isinstance(value, int | float)}
        cells = (f"<tr><td>{html.escape(name)}</td><td>{value:,.4f}</td></tr>" for name, value in rows.items())
        parts.append(f"<h2>On held-out text</h2><table>{''.join(cells)}</table>")
    parts.append("<h2>Patches of held-out text</h2>" + _patches_as_html(text))
    for sample in samples[-3:]:
        parts.append(f"<h2>Sample after {sample['bytes_seen']:,} bytes</h2><pre>{html.escape(sample['sample'])}</pre>")
    config = (run / "config.toml").read_text("utf-8")
    parts.append(f"<details><summary>config.toml</summary><pre>{html.escape(config)}</pre></details>")
    write_whole(run / "report.html", _page(run.name, "\n".join(parts)))


def _patches_as_html(text: PatchedText) -> str:
    """Patches in alternating shades; each byte's entropy is the strength of its underline."""
    spans, cells = [], visible_bytes(text.data)
    patch = 0
    for index, cell in enumerate(cells):
        patch += text.starts[index]
        title, strength = "", 0.0
        if text.entropies_nats is not None:
            nats = text.entropies_nats[index]
            title, strength = f' title="{nats:.2f} nats"', min(nats / BAR_NATS, 1.0)
        shown = html.escape(cell) + ("<br>" if cell == "⏎" else "")
        spans.append(
            f'<span class="patch{patch % 2}" style="border-bottom-color:rgba(200,30,30,{strength:.2f})"{title}>{shown}</span>'
        )
    threshold = "" if text.threshold_nats is None else f" Threshold: {text.threshold_nats:.3f} nats."
    note = (
        f"{len(text.data)} bytes, {len(text.patches)} patches. The redder the line, the harder the byte was.{threshold}"
    )
    return f'<p class="bytes">{"".join(spans)}</p><p>{note}</p>'


def _page(title: str, body: str) -> str:
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
        "pre,.bytes{font-family:ui-monospace,monospace;font-size:14px;white-space:pre-wrap;overflow-wrap:anywhere}"
        ".bytes span{border-bottom:3px solid}.patch0{background:#dbe9f6}.patch1{background:#fbf0d0}"
        "td{padding:.1em 1.5em .1em 0}svg{max-width:100%;height:auto}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><body>{body}</body></html>\n"
    )


def can_draw() -> bool:
    """Whether matplotlib, the [plot] extra, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _new_figure(width: float, height: float) -> Any:
    if not can_draw():
        raise ValueError("pictures and reports need matplotlib: pip install 'blt-lm[plot]'")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _figure_bytes(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)  # drawn as a box
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _svg(figure: Any) -> str:
    text = _figure_bytes(figure, "svg").decode()
    return text[text.index("<svg") :]


def _entropy_figure(text: PatchedText) -> Any:
    """Entropies over the bytes, a line at every patch start, the threshold across: rows of up to 72 bytes."""
    cells = visible_bytes(text.data)
    row_bytes = 72
    num_rows = max(1, -(-len(cells) // row_bytes))
    columns = min(row_bytes, max(8, len(cells)))
    figure = _new_figure(0.16 * columns + 1, 1.5 * num_rows)
    import matplotlib

    with matplotlib.rc_context({"font.family": "monospace"}):
        axes = figure.subplots(num_rows, 1, squeeze=False)[:, 0]
        top = max(text.entropies_nats or [1.0]) * 1.1
        for row, axis in enumerate(axes):
            begin = row * row_bytes
            shown = range(begin, min(begin + row_bytes, len(cells)))
            places = [index - begin for index in shown]
            for index in shown:
                if text.starts[index]:
                    axis.axvline(index - begin - 0.5, color="#999999", linewidth=0.8)
            if text.entropies_nats is not None:
                axis.plot(
                    places, [text.entropies_nats[index] for index in shown], marker=".", color="#c03020", linewidth=1
                )
                if text.threshold_nats is not None:
                    axis.axhline(text.threshold_nats, color="#3060a0", linestyle="--", linewidth=0.8)
                axis.set_ylabel("nats")
            axis.set_xticks(places, [cells[index].replace("$", r"\$") for index in shown])
            axis.tick_params(axis="x", length=0)
            axis.set(xlim=(-0.7, columns - 0.3), ylim=(0, top))
            axis.spines[["top", "right"]].set_visible(False)
    return figure


def _curves(reports: list[dict[str, Any]]) -> Any:
    figure = _new_figure(8, 4)
    axis = figure.subplots()
    for phase, color in (("entropy model", "#3060a0"), ("network", "#c03020")):
        for key, style in (("train_bits_per_byte", "-"), ("valid_bits_per_byte", "o--")):
            points = [(r["bytes_seen"] / 1e6, r[key]) for r in reports if r["phase"] == phase and key in r]
            if points:
                label = f"{phase}, {'held out' if key.startswith('valid') else 'training'}"
                thin = {"alpha": 0.5, "linewidth": 1} if style == "-" else {"markersize": 4}
                axis.plot(*zip(*points, strict=True), style, color=color, label=label, **thin)
    lowest = min(
        (r[key] for r in reports for key in ("train_bits_per_byte", "valid_bits_per_byte") if key in r), default=0
    )
    highest = max(min(6.0, 4 * lowest), lowest + 0.5)
    axis.set(xlabel="bytes seen (MB)", ylabel="bits per byte", ylim=(0.9 * lowest, highest))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure

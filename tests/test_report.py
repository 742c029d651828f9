"""Pictures show every byte and every patch, and a page shows text without running or loading anything."""

import itertools
import json
import re
import shutil
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt.language_model import load
from blt.report import (
    BARS,
    PatchedText,
    _curves,
    _patches_as_html,
    patched_text,
    save_picture,
    terminal_lines,
    visible_bytes,
    write_report,
)

TEXTS = st.binary(min_size=1, max_size=60) | st.text(min_size=1, max_size=20).map(lambda text: text.encode())
MARKUP = "<script>alert(1)</script><img src=x onerror=y> & \"'"


@st.composite
def patched_texts(draw: st.DrawFn) -> PatchedText:
    data = draw(TEXTS)
    starts = [True, *draw(st.lists(st.booleans(), min_size=len(data) - 1, max_size=len(data) - 1))]
    nats = st.lists(st.floats(0, 12), min_size=len(data), max_size=len(data))
    entropies, threshold = draw(st.none() | nats), draw(st.none() | st.floats(0, 5))
    return PatchedText(data, starts, entropies, threshold)


def even_patches(data: bytes) -> PatchedText:
    return PatchedText(data, [index % 4 == 0 for index in range(len(data))], [1.0] * len(data), 1.5)


@given(TEXTS)
def test_every_byte_has_one_cell_of_one_character(data: bytes) -> None:
    cells = visible_bytes(data)
    assert len(cells) == len(data) and all(len(cell) == 1 and cell.isprintable() for cell in cells)


def test_a_cell_takes_exactly_one_column_of_a_terminal() -> None:
    planes = (range(0x20, 0xD800), range(0xE000, 0x10000), range(0x1F000, 0x20000))
    for codepoint in itertools.chain(*planes):
        cell = visible_bytes(chr(codepoint).encode())[0]
        assert unicodedata.category(cell) not in ("Mn", "Me", "Cf"), f"U+{codepoint:04X} takes no column"
        assert unicodedata.east_asian_width(cell) not in ("W", "F"), f"U+{codepoint:04X} takes two columns"


def test_punctuation_and_signs_of_one_column_show_as_they_are() -> None:
    for character in "\u2013\u201c\u20ac\u2192\u221e":
        assert visible_bytes(character.encode()) == [character, "·", "·"]


@given(patched_texts())
def test_patches_join_to_the_text_and_none_is_empty(text: PatchedText) -> None:
    assert b"".join(text.patches) == text.data and all(text.patches)
    assert len(text.patches) == sum(text.starts)
    assert text.mean_patch_bytes == pytest.approx(len(text.data) / len(text.patches))


@given(patched_texts(), st.integers(3, 100))
def test_terminal_lines_show_every_cell_and_a_bar_before_every_patch(text: PatchedText, columns: int) -> None:
    lines = list(terminal_lines(text, columns))
    above, below = lines[::2], lines[1::2]
    marked = (("|" if start else "") + cell for start, cell in zip(text.starts, visible_bytes(text.data), strict=True))
    assert "".join(above) == "".join(marked)
    assert "".join(above).count("|") == len(text.patches) + text.data.count(b"|")
    assert len(above) == len(below) and all(len(line) <= columns for line in lines)


@given(patched_texts())
def test_the_entropy_of_a_byte_stands_under_it(text: PatchedText) -> None:
    above, below = terminal_lines(text, columns=10_000)
    below, column = below.ljust(len(above)), -1
    for index, start in enumerate(text.starts):
        column += 1 + start
        nats = 0.0 if text.entropies_nats is None else text.entropies_nats[index]
        assert below[column] == BARS[round(8 * min(nats, 5.0) / 5.0)]
        assert not start or below[column - 1] == " "


@given(patched_texts())
def test_the_json_of_a_text_has_the_promised_keys(text: PatchedText) -> None:
    figures = json.loads(json.dumps(text.as_json()))
    assert set(figures) == {"patches", "entropies_nats", "threshold_nats"}
    assert b"".join(map(bytes.fromhex, figures["patches"])) == text.data
    assert figures["entropies_nats"] is None or len(figures["entropies_nats"]) == len(text.data)


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def assert_loads_nothing(page: str) -> None:
    for tag, attributes in Tags(page).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "base"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert re.match(r"#|$", attributes.get(name) or ""), (tag, attributes)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?([^)\"']*)", page))


@given(patched_texts())
def test_the_page_of_a_text_shows_its_cells_and_runs_nothing(text: PatchedText) -> None:
    fragment = _patches_as_html(text)
    assert_loads_nothing(fragment)
    parsed = Tags(fragment)
    cells = parsed.texts[: len(text.data)]
    assert cells == visible_bytes(text.data)
    shades = [attributes["class"] for tag, attributes in parsed.tags if tag == "span"]
    changes = sum(a != b for a, b in itertools.pairwise(shades))
    assert changes == len(text.patches) - 1


def test_markup_in_a_text_is_shown_not_obeyed(tmp_path: Path) -> None:
    save_picture(even_patches(MARKUP.encode()), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert_loads_nothing(page)
    assert "".join(Tags(page).texts).count(MARKUP) == 1
    assert page.count("&lt;</span>") == MARKUP.count("<") and "><</span>" not in page


@pytest.mark.parametrize("suffix", [".svg", ".png", ".SVG"])
def test_a_text_can_be_drawn_whatever_its_bytes(suffix: str, tmp_path: Path) -> None:
    data = bytes(range(256)) + "é$x^2$ \\alpha_€ 中文 😀 👩‍👩‍👧 العربية אבג".encode()
    for text in (even_patches(data), even_patches(b"a"), PatchedText(b"ab", [True, False], None, None)):
        path = tmp_path / f"picture{suffix}"
        save_picture(text, path)
        begun = path.read_bytes()[:300]
        assert begun.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in begun


def test_a_picture_of_an_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"page\.pdf: the name must end in \.svg, \.png, \.html or \.json"):
        save_picture(even_patches(b"abc"), tmp_path / "page.pdf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [0.0, 0.5, 2.5, 7.5])
def test_the_axis_of_the_curves_goes_up_and_holds_the_lowest_point(bits: float) -> None:
    reports = [{"phase": "network", "bytes_seen": seen, "train_bits_per_byte": bits} for seen in (10, 20)]
    bottom, top = _curves(reports).axes[0].get_ylim()
    assert bottom <= bits < top


def test_the_report_of_a_run_loads_nothing_and_shows_what_it_is_about(tiny_training: Any) -> None:
    page = (tiny_training.run / "report.html").read_text("utf-8")
    assert_loads_nothing(page)
    shown = "".join(Tags(page).texts)
    assert page.count("<svg") == 1 and "bits_per_byte" in shown and "Sample after 2,560 bytes" in shown
    assert "[model.local_encoder]" in shown


def test_markup_in_samples_names_and_configs_is_shown_not_obeyed(trained_run: Path) -> None:
    run = Path(shutil.copytree(trained_run, trained_run.with_name("<script>run")))
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"phase": "network", "step": 99, "bytes_seen": 5, "sample": MARKUP}) + "\n")
    with (run / "config.toml").open("a") as config:
        config.write(f"# {MARKUP}\n")
    write_report(run, even_patches(MARKUP.encode()), {"bits_per_byte": 1.5})
    page = (run / "report.html").read_text("utf-8")
    assert_loads_nothing(page)
    shown = "".join(Tags(page).texts)
    assert shown.count(MARKUP) == 3 and shown.count("<script>run") == 2


def test_the_picture_agrees_with_the_model(tiny_training: Any) -> None:
    lm, data = load(tiny_training.run), "def x(valué):\n\n  return\xff".encode()
    text = patched_text(lm, data)
    ids = lm.encode(data)
    assert text.data == data and text.patches == lm.patches(data)
    assert text.starts == lm.patch_starts(ids)[0, 1:-1].tolist()
    assert text.entropies_nats == lm.entropies(ids)[0, 1:-1].tolist()
    assert all(0 <= nats <= torch.log(torch.tensor(260.0)) + 1e-4 for nats in text.entropies_nats)
    assert text.threshold_nats == lm.config.patching.threshold_nats

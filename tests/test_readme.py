"""README tells the truth: its files exist and are all there, its code runs, its picture is what a model drew."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from blt.report import PatchedText, terminal_lines

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_every_source_file_is_in_the_reading_order_and_nothing_else() -> None:
    listed = set(re.findall(r"`([\w/]+\.py)`", README.split("## Read it in this order")[1].split("## Limits")[0]))
    sources = {str(path.relative_to(ROOT / "src/blt")) for path in (ROOT / "src/blt").rglob("*.py")}
    assert listed == sources - {"model/__init__.py"}


def test_every_command_is_listed() -> None:
    from blt.cli import app

    listed = set(re.findall(r"^\| `blt (\w+)", README, flags=re.MULTILINE))
    assert listed == {name for name in app if not name.startswith("-")}


def test_the_python_of_the_readme_runs(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace("runs/demo", str(trained_run)), {})
    assert printed.getvalue()
    assert (tmp_path / "model" / "config.json").exists()


def test_the_picture_of_the_readme_is_what_the_demos_model_drew() -> None:
    recorded = json.loads((ROOT / "docs" / "patches.json").read_text("utf-8"))
    patches = [bytes.fromhex(patch) for patch in recorded["patches"]]
    starts = [index == 0 for patch in patches for index in range(len(patch))]
    text = PatchedText(b"".join(patches), starts, recorded["entropies_nats"], recorded["threshold_nats"])
    assert f'blt patch runs/demo "{text.data.decode()}"\n' + "\n".join(terminal_lines(text, 80)) in README


def test_both_commands_stand_in_the_readme_and_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in ("demo", "test"):
        assert f"`make {target}`" in README
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)

"""The model that comes with the package: there without a network, small, and what its card and its results say it is."""

import json
import socket
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import builtin_model
import pytest

import blt
from blt.language_model import model_folder

Blt = Callable[..., Any]
RESULTS = Path(builtin_model.__file__).parent / "results" / "builtin_model.json"
PROSE = "She opened the letter at the kitchen table and read it twice, slowly, before she said a word to anyone. "
CODE = "    for name, value in sorted(items.items()):\n        if value is None:\n            continue\n"


def test_it_comes_with_the_package_and_is_small() -> None:
    folder = model_folder("builtin")
    assert folder == Path(str(files("blt"))) / "builtin"
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert on_disk == json.loads(RESULTS.read_text())["bytes_on_disk"]
    assert 1_000_000 < on_disk <= builtin_model.MOST_BYTES


def test_its_card_tells_licence_texts_and_the_figures_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    card = blt.load("builtin").card
    assert capsys.readouterr().err == "builtin: licence apache-2.0\n"
    assert card.license == "apache-2.0" and card.source is None
    assert card.training is not None and all(what in card.training for what in builtin_model.SOURCES.values())
    found = json.loads(RESULTS.read_text())["files"]
    assert {figure["text"]: figure["bits_per_byte"] for figure in card.figures} == {
        domain: of["bits_per_byte"] for domain, of in found.items()
    }


def test_it_knows_prose_from_noise_and_code_from_prose() -> None:
    lm = blt.load("builtin")
    assert lm.score(PROSE).bits_per_byte < 3
    assert lm.score(CODE).bits_per_byte < 3
    assert lm.score("".join(sorted(PROSE))).bits_per_byte > 1.3 * lm.score(PROSE).bits_per_byte
    assert 3 < len(PROSE) / len(lm.patches(PROSE)) < 8


def test_a_folder_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder("builtin").is_absolute()
    (tmp_path / "builtin").mkdir()
    assert model_folder("builtin") == Path("builtin")


def test_commands_use_it_on_a_machine_without_a_network(
    blt_command: Blt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object) -> NoReturn:
        raise AssertionError("somebody asks the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.chdir(tmp_path)
    assert len(blt_command("generate", "builtin", "The", "--max-bytes", "20").stdout) >= 20
    assert b"patches of" in blt_command("patch", "builtin", PROSE).stdout
    assert b"latent" in blt_command("flops", "builtin").stdout
    assert not list(tmp_path.iterdir())

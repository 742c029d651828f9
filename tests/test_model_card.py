"""A card says what is known of a model, keeps what others said of it, and claims nothing."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import metadata_load
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from tiny import random_models, tiny_config

import blt
from blt.config import ModelConfig, NgramEntropyModelConfig, PatchingConfig
from blt.language_model import HUB_FILES
from blt.model_card import ModelCard, card_files, read_card
from blt.model_files import convert, save_model

NGRAMS = tiny_config(entropy_model=NgramEntropyModelConfig(kind="ngram", max_order=4, table_bits=8))
FULL = ModelCard(
    license="other",
    license_name="fair-noncommercial",
    license_link="https://example.org/licence",
    license_text="Terms\n\nDo no harm: é\n",
    source="somebody/blt-of-theirs",
    training='on 2.00 MB of text (a: b, "c") by nobody',
    figures=({"text": "held out", "bits_per_byte": 1.5, "mean_patch_bytes": 4.25, "bytes": 1234},),
)


def save(folder: Path, card: ModelCard = ModelCard(), config: ModelConfig | None = None) -> Path:
    config = config or tiny_config()
    save_model(folder, config, *random_models(config), card)
    return folder


@pytest.mark.parametrize("card", [FULL, ModelCard(), ModelCard(license="apache-2.0")], ids=["full", "none", "one"])
def test_what_a_card_says_comes_back_through_load_save_and_convert(card: ModelCard, tmp_path: Path) -> None:
    first = save(tmp_path / "first", card)
    assert read_card(first) == card
    lm = blt.load(first, device="cpu")
    assert lm.card == card
    lm.save(tmp_path / "second")
    convert(first, tmp_path / "third", "hf")
    for again in ("second", "third"):
        assert read_card(tmp_path / again) == card
        assert (tmp_path / again / "README.md").read_bytes() == (first / "README.md").read_bytes()
        assert (tmp_path / again / "LICENSE").exists() == (card.license_text is not None)


def test_a_trained_model_has_the_figures_of_its_evaluation_and_claims_no_licence(tiny_training: Any) -> None:
    figures, model = tiny_training.finished.json, tiny_training.run / "model"
    text, card = (model / "README.md").read_text("utf-8"), read_card(model)
    assert f"{figures['bits_per_byte']:.3f} | {figures['gzip_bits_per_byte']:.3f}" in text
    assert card.figures[0]["bits_per_byte"] == figures["bits_per_byte"]
    assert card.training is not None and re.search(
        r"MB of text \(text\) in rows of 32 .* torch .* on cpu", card.training
    )
    assert "license" not in metadata_load(model / "README.md") and "none was given" in text
    assert str(model.parents[1]) not in text  # paths may tell more than they should


def test_the_licence_of_an_entropy_model_that_was_taken_is_said(
    trained_run: Path, tiny_toml: Path, blt_command: Any, tmp_path: Path
) -> None:
    (trained_run / "model" / "LICENSE").write_text("Theirs alone")
    options = ["--set", f'pretrained_entropy_model="{trained_run}"', "--set", "entropy_training=none"]
    assert blt_command("train", tiny_toml, *options, "--out", tmp_path / "second").code == 0
    training = read_card(tmp_path / "second" / "model").training
    assert training is not None and training.endswith("with the entropy model of run (its licence: Theirs alone)")
    trained_run.rename(tmp_path / "elsewhere")
    assert blt_command("train", tiny_toml, *options, "--out", tmp_path / "second", "--resume").code == 0
    training = read_card(tmp_path / "second" / "model").training
    assert training is not None and training.endswith(
        "with the entropy model of run (its licence: could not be read again)"
    )


def test_the_front_matter_is_the_hubs(tmp_path: Path) -> None:
    front = metadata_load(save(tmp_path, FULL) / "README.md")
    assert front is not None
    assert front["license"] == "other" and front["license_name"] == "fair-noncommercial"
    assert front["base_model"] == "somebody/blt-of-theirs"
    assert front["pipeline_tag"] == "text-generation" and front["library_name"] == "transformers"


def test_shape_patching_and_how_to_load_are_said() -> None:
    text = card_files(FULL, tiny_config(patching=PatchingConfig(threshold_nats=1.25, max_patch_bytes=9)), [])[
        "README.md"
    ]
    for said in ("2,400 are table rows", "rule `entropy`, threshold 1.25 nats, at most 9 bytes", "up to 1,023 bytes"):
        assert said in text
    assert "AutoModelForCausalLM" in text and "blt.load" in text


def test_a_model_that_transformers_refuses_says_why(tmp_path: Path) -> None:
    text = (save(tmp_path, config=NGRAMS) / "README.md").read_text("utf-8")
    assert "`transformers` refuses this model" in text and "an entropy model of n-gram statistics" in text
    assert "AutoModelForCausalLM" not in text
    assert metadata_load(tmp_path / "README.md")["library_name"] == "blt"


@pytest.mark.parametrize(
    ("card", "line"),
    [
        (FULL, "fair-noncommercial (https://example.org/licence)"),
        (ModelCard(license="cc-by-nc-4.0"), "cc-by-nc-4.0"),
        (ModelCard(license="other", license_text="# My own terms\n..."), "My own terms"),
        (ModelCard(license_text="\n\n   Apache License\n"), "Apache License"),
        (ModelCard(license="other"), "other"),
    ],
)
def test_the_licence_of_a_model_is_said_on_stderr_in_one_line(
    card: ModelCard, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blt.load(save(tmp_path, card), device="cpu")
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"{tmp_path}: licence {line}\n"


def test_nothing_is_said_where_there_is_no_licence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blt.load(save(tmp_path), device="cpu")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no front matter",
        "---\n: [\n---\n",
        "---\n3\n---\n",
        "---\nlicense: [a, b]\nblt: 3\n---\n",
        "---\nblt: {figures: 3}\n---\n",
    ],
)
def test_a_card_of_another_form_keeps_no_model_from_being_loaded(text: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "README.md").write_text(text)
    assert blt.load(tmp_path, device="cpu").card == ModelCard()


def test_a_card_that_is_no_text_keeps_no_model_from_being_loaded(tmp_path: Path) -> None:
    (save(tmp_path) / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert blt.load(tmp_path, device="cpu").card.license is None


# the hub


def raising(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **_: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


def http(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("refused\nwith more to say", response=response)


HUB_ERRORS = {
    "gated": (
        http(GatedRepoError, 403),
        ("is gated", "https://huggingface.co/facebook/blt-1b", "hf auth login", "HF_TOKEN"),
    ),
    "missing": (http(RepositoryNotFoundError, 404), ("no model of that name", "private", "hf auth login")),
    "no_name": (HFValidationError("--"), ("no model of that name",)),
    "offline": (OfflineModeIsEnabled("offline"), ("not in the cache", "hf download facebook/blt-1b --local-dir")),
    "no_network": (LocalEntryNotFoundError("nothing"), ("there is no network", "give that folder")),
    "other": (http(HfHubHTTPError, 500), ("HfHubHTTPError", "refused", "give its folder")),
    "disk": (OSError(28, "No space left on device"), ("No space left on device",)),
}


@pytest.mark.parametrize("name", HUB_ERRORS)
def test_each_way_the_hub_refuses_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, said = HUB_ERRORS[name]
    raising(error, monkeypatch)
    with pytest.raises(FileNotFoundError) as refusal:
        blt.load("facebook/blt-1b")
    message = str(refusal.value)
    assert message.startswith("facebook/blt-1b ")
    assert all(word in message for word in said), message
    assert message.count("\n") == 0


def test_offline_by_choice_names_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    raising(LocalEntryNotFoundError("nothing"), monkeypatch)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE forbids the network"):
        blt.load("facebook/blt-1b")


def test_a_model_of_the_hub_is_named_as_the_source_and_no_other_pickle_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = save(tmp_path / "hub", ModelCard(license="cc-by-nc-4.0")), []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    lm = blt.load("facebook/blt-1b", device="cpu")
    assert asked == [("facebook/blt-1b", HUB_FILES)]
    assert {"entropy_model/*", "README.md", "LICENSE*", "*.safetensors", "*.json"} == set(HUB_FILES)
    assert lm.card == ModelCard(license="cc-by-nc-4.0", source="facebook/blt-1b")

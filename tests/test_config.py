"""Configs: every knob is read, nothing wrong passes, and a file, a preset and a command line say the same thing."""

import ast
import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

import blt.config
from blt.config import Config, RunConfig
from blt.config_file import preset_names, read_run_config, to_toml

SOURCES = Path(blt.config.__file__).parent
STACK = {"num_layers": 1, "width": 16, "num_heads": 2}


def minimal(**changes: Any) -> dict[str, Any]:
    """The values of a small config, some of them changed: ``minimal(**{"training.seed": 3})``."""
    model = {name: dict(STACK) for name in ("entropy_model", "local_encoder", "latent", "local_decoder")}
    values: dict[str, Any] = {
        "model": {**model, "patching": {}, "hash_embeddings": {}},
        "data": {},
        "calibration": {},
        "entropy_training": {"total_bytes": 4096},
        "training": {"total_bytes": 4096},
    }
    for place, value in changes.items():
        *sections, name = place.split(".")
        section = values
        for part in sections:
            section = section[part]
        if value is None:
            section.pop(name, None)
        else:
            section[name] = value
    return values


def config_file(folder: Path, **changes: Any) -> Path:
    (folder / "own.toml").write_text(tomli_w.dumps(minimal(**changes)))
    return folder / "own.toml"


# what is refused


@pytest.mark.parametrize(
    "place", ["wdith", "model.wdith", "model.latent.wdith", "training.wdith", "data.wdith", "calibration.wdith"]
)
def test_an_unknown_key_is_named_with_its_file(place: str, tmp_path: Path) -> None:
    file = config_file(tmp_path, **{place: 3})
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {re.escape(place)}: unknown key$"):
        read_run_config(file)


def test_every_fault_of_a_file_is_named_at_once(tmp_path: Path) -> None:
    file = config_file(tmp_path, **{"model.latent.width": None, "training.sed": 1, "training.row_bytes": "many"})
    with pytest.raises(ValueError, match=r"own\.toml") as refusal:
        read_run_config(file)
    for fault in ("model.latent.width: Field required", "training.sed: unknown key", "training.row_bytes: Input"):
        assert fault in str(refusal.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("training.seed", "0"),
        ("training.seed", 1.0),
        ("training.seed", True),
        ("training.total_bytes", 1e6),
        ("training.learning_rate", "fast"),
        ("training.dtype", "float16"),
        ("training.schedule", "linear"),
        ("training.betas", [0.9]),
        ("training.betas", [0.9, 0.95, 0.99]),
        ("data.raw", "no"),
        ("data.raw", 1),
        ("data.paths", "stdlib"),
        ("data.paths", [1]),
        ("model.patching.rule", "bpe"),
        ("model.patching.threshold_nats", "high"),
        ("model.hash_embeddings.ngram_bytes", 3),
        ("model.hash_embeddings.ngram_bytes", [3.5]),
        ("model.entropy_model.reset_at_newline", "yes"),
        ("model.latent", 3),
        ("training", []),
        ("pretrained_entropy_model", 3),
    ],
)
def test_a_value_of_another_type_is_refused_not_converted(place: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"own.toml: {place}")):
        read_run_config(config_file(tmp_path, **{place: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.latent.width": 18, "model.latent.num_heads": 6}, "width 18 does not split into 6 heads of an even"),
        ({"model.local_encoder.width": 15}, "width 15 does not split into 2 heads"),
        ({"model.latent.num_layers": 0}, "model.latent.num_layers: Input should be greater than or equal to 1"),
        ({"model.latent.window_positions": 0}, "window_positions: Input should be greater"),
        ({"model.latent.rope_theta": 0.0}, "rope_theta: Input should be greater than 0"),
        ({"model.latent.norm_eps": 0.0}, "norm_eps: Input should be greater than 0"),
        ({"model.latent.ffn_width": 0}, "ffn_width: Input should be greater"),
        ({"model.patching.patch_bytes": 4}, "patch_bytes belongs to rule 'fixed'"),
        ({"model.patching.rule": "fixed"}, "'fixed' needs it"),
        (
            {"model.patching.rule": "space", "model.patching.threshold_nats": 1.0},
            "threshold_nats does not apply to rule 'space'",
        ),
        (
            {"model.patching.rounded_entropies": True},
            "rounded_entropies belongs to rule 'entropy_rise', not to 'entropy'",
        ),
        ({"model.patching.max_patch_bytes": 0}, "max_patch_bytes: Input should be greater"),
        ({"model.hash_embeddings.ngram_bytes": []}, "ngram_bytes"),
        ({"model.hash_embeddings.ngram_bytes": [0, 3]}, "different sizes of at least 1, got \\[0, 3\\]"),
        ({"model.hash_embeddings.ngram_bytes": [3, 3]}, "different sizes of at least 1, got \\[3, 3\\]"),
        ({"model.hash_embeddings.num_functions": 12}, "num_functions: Input should be less than or equal to 11"),
        ({"model.hash_embeddings.table_rows": 0}, "table_rows: Input should be greater"),
        ({"model.local_decoder.width": 32}, "local_encoder.width 16 must equal local_decoder.width 32"),
        (
            {"model.entropy_model": None, "entropy_training": None},
            "patching rule 'entropy' needs \\[model.entropy_model\\]",
        ),
        ({"model.slots_per_patch": 0}, "slots_per_patch: Input should be greater"),
        ({"model.max_bytes": 1}, "max_bytes: Input should be greater"),
        ({"data.paths": []}, "data.paths"),
        ({"data.held_out_fraction": 0.0}, "held_out_fraction: Input should be greater than 0"),
        ({"data.held_out_fraction": 1.0}, "held_out_fraction: Input should be less than 1"),
        ({"calibration.target_patch_bytes": 1.0}, "target_patch_bytes: Input should be greater than 1"),
        ({"calibration.sample_bytes": 999}, "sample_bytes: Input should be greater"),
        ({"training.micro_batches": 3}, "rows_per_step 8 does not split into 3 micro_batches"),
        ({"training.total_bytes": 0}, "total_bytes: Input should be greater"),
        ({"training.row_bytes": 3}, "row_bytes: Input should be greater"),
        ({"training.learning_rate": 0.0}, "learning_rate: Input should be greater than 0"),
        ({"training.table_learning_rate": 0.0}, "table_learning_rate: Input should be greater than 0"),
        ({"training.decay_fraction": 1.5}, "decay_fraction: Input should be less than or equal to 1"),
        ({"training.warmup_steps": -1}, "warmup_steps: Input should be greater"),
        ({"training.adam_eps": 0.0}, "adam_eps: Input should be greater than 0"),
        ({"training.weight_decay": -0.1}, "weight_decay: Input should be greater"),
        ({"training.clip_norm": 0.0}, "clip_norm: Input should be greater than 0"),
        ({"training.seed": -1}, "seed: Input should be greater"),
        ({"training.evaluation_bytes": 0}, "evaluation_bytes: Input should be greater"),
        ({"training.steps_per_save": 0}, "steps_per_save: Input should be greater"),
        ({"training.steps_per_report": 0}, "steps_per_report: Input should be greater"),
        ({"training.steps_per_evaluation": 0}, "steps_per_evaluation: Input should be greater"),
        ({"entropy_training": None}, "needs either \\[entropy_training\\] or pretrained_entropy_model"),
        ({"pretrained_entropy_model": "runs/x"}, "needs either \\[entropy_training\\] or pretrained_entropy_model"),
        (
            {"model.entropy_model": None, "model.patching.rule": "space"},
            "without one, neither",
        ),
        ({"model.entropy_model": {"kind": "ngram"}}, "counted, not trained; leave \\[entropy_training\\] out"),
        ({"model.entropy_model.kind": "bigram"}, "entropy_model: kind must be one of transformer, ngram, got 'bigram'"),
        ({"model.entropy_model": {"kind": "ngram", "width": 8}}, "toml: model.entropy_model.width: unknown key"),
        (
            {"model.entropy_model": {"kind": "ngram", "max_order": 2}},
            "toml: model.entropy_model.max_order: Input should",
        ),
        ({"model.entropy_model": {"kind": "ngram", "table_bits": 25}}, "table_bits: Input should be less"),
        ({"model.entropy_model": {"kind": "ngram", "backoff": 0.0}}, "backoff: Input should be greater than 0"),
        ({"model.entropy_model.table_bits": 9}, "toml: model.entropy_model.table_bits: unknown key"),
    ],
)
def test_what_could_only_fail_later_is_refused_with_its_place(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read_run_config(config_file(tmp_path, **changes))
    assert "own.toml: " in str(refusal.value) and "pydantic" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.row_bytes": 600, "model.max_bytes": 512}, "row_bytes 600"),
        ({"entropy_training.row_bytes": 600, "model.max_bytes": 512}, "row_bytes 600"),
        ({"training.betas": [0.9, 1.5]}, "betas"),
        ({"training.betas": [-0.1, 0.9]}, "betas"),
        ({"training.learning_rate": float("inf")}, "learning_rate"),
        ({"training.clip_norm": float("inf")}, "clip_norm"),
        ({"model.patching.threshold_nats": float("nan")}, "threshold_nats"),
    ],
)
def test_what_training_would_choke_on_is_refused_before_it_starts(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_run_config(config_file(tmp_path, **changes))


def test_a_config_cannot_be_changed_in_place() -> None:
    config = RunConfig.model_validate(minimal())
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 5  # type: ignore[misc]


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path) -> None:
    config = read_run_config("tiny")
    (tmp_path / "marked.toml").write_text(to_toml(config), "utf-8-sig")
    assert read_run_config(tmp_path / "marked.toml") == config


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[model\n")
    with pytest.raises(ValueError, match=r"own\.toml is not TOML: .*line 1"):
        read_run_config(tmp_path / "own.toml")


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(ValueError, match=r"own\.toml"):
        read_run_config(tmp_path / "own.toml")


@pytest.mark.parametrize("missing", ["nonesuch", "nonesuch.toml", "folder/nonesuch.toml", "."])
def test_a_missing_file_is_answered_with_the_presets(missing: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(missing)) as refusal:
        read_run_config(missing)
    assert preset_names() and all(name in str(refusal.value) for name in preset_names())


# --set


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.seed=7", 7),
        ("training.learning_rate=3e-4", 3e-4),
        ("training.learning_rate = 0.5", 0.5),
        ('training.schedule="warmup_stable_decay"', "warmup_stable_decay"),
        ("training.schedule=warmup_stable_decay", "warmup_stable_decay"),
        ("model.latent.num_layers=4", 4),
        ("model.entropy_model.reset_at_newline=true", True),
        ("model.hash_embeddings.ngram_bytes=[2, 3]", (2, 3)),
        ('data.paths=["a b", "c=d"]', ("a b", "c=d")),
        ("training.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("pretrained_entropy_model=some/model=1", "some/model=1"),
    ],
)
def test_an_override_of_any_kind_arrives_where_it_points(override: str, expected: Any, tmp_path: Path) -> None:
    place = override.partition("=")[0].strip()
    changes = {"entropy_training": None} if place == "pretrained_entropy_model" else {}
    found: Any = read_run_config(config_file(tmp_path, **changes), [override])
    for part in place.split("."):
        found = getattr(found, part)
    assert found == expected and type(found) is type(expected)


def test_an_override_reaches_into_a_section_that_the_file_lacks(tmp_path: Path) -> None:
    file = config_file(tmp_path, data=None, calibration=None)
    config = read_run_config(file, ["data.raw=true", "calibration.target_patch_bytes=6.0"])
    assert config.data.raw and config.calibration.target_patch_bytes == 6.0


@pytest.mark.parametrize("none", ["none", "None", " none "])
def test_none_takes_a_value_or_a_section_away(none: str, tmp_path: Path) -> None:
    file = config_file(tmp_path, **{"model.patching.threshold_nats": 1.5, "training.seed": 9})
    assert read_run_config(file).model.patching.threshold_nats == 1.5
    overrides = [f"model.patching.threshold_nats={none}", f"training.seed={none}", f"training.nonesuch={none}"]
    config = read_run_config(file, overrides)
    assert config.model.patching.threshold_nats is None and config.training.seed == 0
    bare = [f"model.entropy_model={none}", f"entropy_training={none}", "model.patching.rule=space"]
    assert read_run_config(file, [*bare, overrides[0]]).model.entropy_model is None


def test_the_last_of_several_overrides_wins(tmp_path: Path) -> None:
    overrides = ["training.seed=1", "training.seed=2"]
    assert read_run_config(config_file(tmp_path), overrides).training.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed", "--set wants section.key=value, got 'training.seed'"),
        ("training.seed.deep=1", "seed is not a section"),
        ("training.sed=1", "training.sed: unknown key"),
        ("trainin.seed=1", "trainin: unknown key"),
        ("training.seed=many", "training.seed: Input should be a valid integer"),
        ("training.seed=", "training.seed: Input should be a valid integer"),
        ("=1", "unknown key"),
        ("training=5", "training: Input should be a valid dictionary"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_run_config(config_file(tmp_path, **{"training.seed": 3}), [override])


def test_defaults_give_way_to_the_file_and_the_file_to_overrides(tmp_path: Path) -> None:
    assert read_run_config(config_file(tmp_path)).training.row_bytes == 512
    file = config_file(tmp_path, **{"training.row_bytes": 64})
    assert read_run_config(file).training.row_bytes == 64
    assert read_run_config(file, ["training.row_bytes=32"]).training.row_bytes == 32


# presets and TOML


def preset_config(preset: str | Path) -> RunConfig:
    """Finetune goes on with a model, any model."""
    if Path(preset).stem == "finetune":
        return read_run_config(preset, ["init=runs/demo"], tiny_config())
    return read_run_config(preset)


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_comes_back_equal_from_its_own_toml(preset: str, tmp_path: Path) -> None:
    config = preset_config(preset)
    (tmp_path / "copy.toml").write_text(to_toml(config))
    again = read_run_config(tmp_path / "copy.toml")
    assert again == config and to_toml(again) == to_toml(config)


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_is_found_by_its_name_and_by_its_file(preset: str) -> None:
    assert preset_config(preset) == preset_config(SOURCES / "configs" / f"{preset}.toml")


def test_a_file_beside_us_goes_before_a_preset_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config_file(tmp_path, **{"training.seed": 77}).rename("demo")
    assert read_run_config("demo").training.seed == 77


@given(
    st.floats(1e-9, 10), st.integers(0, 2**40), st.lists(st.text(min_size=1), min_size=1), st.none() | st.floats(-9, 9)
)
def test_any_values_survive_toml(rate: float, seed: int, paths: list[str], threshold: float | None) -> None:
    changes = {"training.learning_rate": rate, "training.seed": seed, "data.paths": paths}
    config = RunConfig.model_validate(minimal(**changes, **{"model.patching.threshold_nats": threshold}))
    assert RunConfig.model_validate(tomllib.loads(to_toml(config))) == config


def test_absent_values_stay_out_of_toml() -> None:
    written = tomllib.loads(to_toml(RunConfig.model_validate(minimal())))
    assert "threshold_nats" not in written["model"]["patching"] and "pretrained_entropy_model" not in written
    assert written["model"]["patching"]["rule"] == "entropy"  # a default is written out


def test_a_dry_run_shows_the_config_that_would_run(blt_command: Any, tmp_path: Path) -> None:
    file = config_file(tmp_path, **{"training.seed": 3})
    options = ["--set", "training.row_bytes=32", "--data", "here", "there", "--dry-run"]
    shown = blt_command("train", file, *options, "--json").json
    expected = read_run_config(file, ["training.row_bytes=32", 'data.paths=["here", "there"]'])
    assert shown == json.loads(expected.model_dump_json())
    printed = blt_command("train", file, *options).stdout.decode()
    assert to_toml(expected) in printed


def test_a_dry_run_shows_the_seed_and_precision_of_the_command_line(blt_command: Any, tmp_path: Path) -> None:
    options = ["--seed", "7", "--dtype", "bfloat16", "--dry-run", "--json"]
    shown = blt_command("train", config_file(tmp_path), *options).json
    for section in ("training", "entropy_training"):
        assert (shown[section]["seed"], shown[section]["dtype"]) == (7, "bfloat16")


# every knob is read


def config_classes() -> list[type[Config]]:
    classes = [found for _, found in inspect.getmembers(blt.config, inspect.isclass) if issubclass(found, Config)]
    return [found for found in classes if found is not Config]


def attributes_read(sources: Path) -> set[str]:
    """The names that some line reads as ``something.name``; a validator that only checks a field does not read it."""
    names = set()
    for file in sources.rglob("*.py"):
        tree = ast.parse(file.read_text("utf-8"))
        validators = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and "validator" in "".join(map(ast.dump, node.decorator_list))
        ]
        inside = {id(node) for validator in validators for node in ast.walk(validator)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in inside:
                names.add(node.attr)
    return names


def test_every_config_field_is_read_somewhere() -> None:
    read = attributes_read(SOURCES)
    dead = [f"{kind.__name__}.{name}" for kind in config_classes() for name in kind.model_fields if name not in read]
    assert not dead, f"no line of src/blt reads {', '.join(dead)}"


def test_every_number_in_a_config_has_a_bound() -> None:
    """A bare number without bounds would accept anything; a threshold is the one that may be any number."""
    for kind in config_classes():
        for name, field in kind.model_fields.items():
            if field.annotation in (int, float):
                assert field.metadata, f"{kind.__name__}.{name} takes any number"

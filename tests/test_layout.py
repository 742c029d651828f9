"""The code keeps to a layout: names that say something, files of one sitting, imports when needed."""

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import shape_checks
import torch

import blt
from blt.byte_ids import document_ids

PACKAGE = Path(blt.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
SAYS_NOTHING = {"utils", "util", "common", "core", "base", "helpers", "helper", "types", "ops", "misc"}
ABBREVIATED = {"bs", "seq_len", "embeds", "h_cross", "cross_attn_k", "toks", "cfg"}  # we write the words
LONGEST_FILE, LONGEST_FUNCTION = 450, 90


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    tree = ast.parse(path.read_text("utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_there_are_sources_to_check() -> None:
    assert {"cli.py", "config.py", "model/patching.py"} <= {named(path) for path in SOURCES}


def test_no_file_or_folder_has_a_name_that_says_nothing() -> None:
    entries = [path for path in PACKAGE.rglob("*") if "__pycache__" not in path.parts]
    assert not [named(path) for path in entries if path.stem.strip("_") in SAYS_NOTHING]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_function_has_a_name_that_says_nothing(path: Path) -> None:
    assert not [node.name for node in functions(path) if node.name.strip("_") in SAYS_NOTHING]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_identifier_is_an_abbreviation(path: Path) -> None:
    with path.open("rb") as file:
        words = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.NAME]
    found = [f"{word.string} in line {word.start[0]}" for word in words if word.string in ABBREVIATED]
    assert not found


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_tokens_are_only_other_models_units(path: Path) -> None:
    """Some files compare with token models or learn from them; everywhere else the model reads bytes and patches."""
    with path.open("rb") as file:
        words = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.NAME]
    tokens = [word for word in words if re.search(r"(^|_)tokens?(_|$)", word.string)]
    tokens = [
        word for word in tokens if not re.search(r"token_(model|teacher|lesson)", word.string)
    ]  # what one is taken for
    allowed = {"token_embedding_projection", "_pad_token_tensor"}  # a released weight's name, transformers' attribute
    if path.name not in ("flops.py", "token_model.py", "token_teacher.py"):
        assert not [f"{word.string} in line {word.start[0]}" for word in tokens if word.string not in allowed]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_function_fits_on_a_screen_or_two(path: Path) -> None:
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(path)}
    assert not {name: lines for name, lines in sizes.items() if lines > LONGEST_FUNCTION}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_module_begins_with_what_it_is_about(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    if path.name in ("__init__.py", "__main__.py") and len(tree.body) <= 2:
        return
    assert (ast.get_docstring(tree) or "").strip()


@pytest.mark.parametrize("path", [*SOURCES, *sorted(PACKAGE.glob("configs/*"))], ids=named)
def test_no_path_of_one_machine_stands_in_the_sources(path: Path) -> None:
    assert not re.search(r"/(home|root|work|Users|tmp|mnt|data)/", path.read_text("utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_nothing_is_put_off_or_commented_out(path: Path) -> None:
    with path.open("rb") as file:
        comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    for comment in comments:
        text = comment.string.lstrip("# ")
        assert not re.match(r"(TODO|FIXME|XXX|HACK)\b", text), f"line {comment.start[0]}: {text}"
        assert not re.match(r"(import \w+$|from \w+ import|return$|def \w+\(|\w+ = \w+\()", text), text


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after ``code``."""
    report = "; import sys; print('\\nloaded', *{name.partition('.')[0] for name in sys.modules})"
    child = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(child.stdout.splitlines()[-1].split()[1:])


HELP_OF_ALL = """
import sys
from blt.cli import main
names = ('doctor', 'demo', 'train', 'entropies', 'evaluate', 'generate', 'patch', 'convert', 'flops')
for command in ([], *([name] for name in names)):
    sys.argv = ['blt', *command, '--help']
    try:
        main()
    except SystemExit as end:
        assert not end.code
pass"""


@pytest.mark.parametrize("code", ["import blt", "import blt.cli", HELP_OF_ALL], ids=["import", "cli", "help"])
def test_help_does_not_wait_for_torch(code: str) -> None:
    loaded = loaded_by(code)
    assert "blt" in loaded
    assert not loaded & {"torch", "numpy", "pyarrow", "matplotlib", "huggingface_hub", "safetensors", "transformers"}


def test_the_command_and_the_module_are_one_program() -> None:
    timed = [sys.executable, "-X", "importtime", "-m", "blt", "--help"]
    child = subprocess.run(timed, capture_output=True, text=True, check=True)
    assert child.stdout.startswith("Usage: blt COMMAND")
    imported = {line.split("|")[-1].strip() for line in child.stderr.splitlines() if line.startswith("import time:")}
    assert "blt.cli" in imported and "torch" not in imported


def test_the_public_names_are_the_documented_ones_and_import_on_first_use() -> None:
    assert set(blt.__all__) == {"ByteStreamer", "LanguageModel", "TrainerModel", "fast_generate", "load"}
    homes = {name: getattr(blt, name).__module__ for name in blt.__all__}
    assert {homes["LanguageModel"], homes["load"]} == {"blt.language_model"}
    assert homes["TrainerModel"] == "blt.huggingface_trainer"
    assert {homes["ByteStreamer"], homes["fast_generate"]} == {"blt.huggingface_generate"}
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = blt.nonesuch


def test_every_shape_of_the_glossary_is_used_somewhere() -> None:
    aliases = re.findall(r"^(\w+) = ", (PACKAGE / "shapes.py").read_text(), flags=re.MULTILINE)
    elsewhere = "".join(path.read_text() for path in SOURCES if path.name != "shapes.py")
    assert aliases
    assert [alias for alias in aliases if not re.search(rf"\b{alias}\b", elsewhere)] == []


def test_shapes_in_signatures_are_checked_at_first_calls_and_some_later_ones() -> None:
    refused = []
    for call in range(1, 3 * shape_checks.EVERY):
        try:
            document_ids(torch.zeros(2, 3, 4, dtype=torch.long))
        except jaxtyping.TypeCheckError:
            refused.append(call)
    assert refused == [*range(1, shape_checks.FIRST_CALLS + 1), shape_checks.EVERY, 2 * shape_checks.EVERY]

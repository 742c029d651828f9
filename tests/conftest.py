"""Shapes are checked in tests: the types in blt.shapes are the specification.

Configs and flops hold no tensors, and pydantic checks its own.
"""

import contextlib
import io
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest
import shape_checks

_WITH_TENSORS = (
    *(
        "byte_ids",
        "corpus",
        "entropy_cache",
        "entropy_scoring",
        "evaluate",
        "generate",
        "huggingface_generate",
        "huggingface_trainer",
        "incremental",
    ),
    *(
        "continuations",
        "language_model",
        "model",
        "optimise",
        "sampling",
        "speculate",
        "starting_points",
        "token_model",
        "token_teacher",
        "train",
    ),
)
hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine fails no property
hypothesis.settings.load_profile("unhurried")
shape_checks.install([f"blt.{module}" for module in _WITH_TENSORS])


@pytest.hookimpl(tryfirst=True)  # before fixtures, which call much for the first time
def pytest_runtest_setup() -> None:
    shape_checks.begin_test()


@dataclass(frozen=True)
class Finished:
    """What a command left behind: its exit code, what stood on stdout and on stderr."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout; anything else there raises."""
        assert self.code == 0, self.stderr
        found = json.loads(self.stdout)
        assert isinstance(found, dict)
        return found


def run_blt(*arguments: object, stdin: bytes = b"") -> Finished:
    """``blt ARGUMENTS`` in this process."""
    from blt.cli import main

    given, out, errors = io.TextIOWrapper(io.BytesIO(stdin), "utf-8"), io.BytesIO(), io.StringIO()
    written, code = io.TextIOWrapper(out, "utf-8"), 0
    patched = (
        mock.patch.object(sys, "argv", ["blt", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", given),
        contextlib.redirect_stdout(written),
        contextlib.redirect_stderr(errors),
    )
    with contextlib.ExitStack() as stack:
        for context in patched:
            stack.enter_context(context)
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    written.flush()
    return Finished(code, out.getvalue(), errors.getvalue())


@pytest.fixture(scope="session")
def blt_command() -> Callable[..., Finished]:
    return run_blt


TINY_RUN = """
[data]
paths = [{paths}]
held_out_fraction = 0.3
[model]
max_bytes = 512
[model.entropy_model]
window_positions = 32
{stack}
[model.hash_embeddings]
ngram_bytes = [3, 4]
table_rows = 64
[model.local_encoder]
window_positions = 32
{stack}
[model.latent]
{stack}
[model.local_decoder]
window_positions = 32
{stack}
[entropy_training]
{steps}
[calibration]
target_patch_bytes = 3.0
sample_bytes = 1000
[training]
{steps}
evaluation_bytes = 500
"""
TINY_STACK = "num_layers = 1\nwidth = 16\nnum_heads = 2\nffn_width = 24"
TINY_STEPS = (
    "total_bytes = 2560\nrow_bytes = 32\nrows_per_step = 4\nlearning_rate = 1e-2\nwarmup_steps = 2\n"
    'dtype = "float32"\nsteps_per_report = 10'
)


@pytest.fixture(scope="session")
def tiny_toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for ``blt train`` whose run takes a second, of a model that ``transformers`` can load too.

    Its text is eight files, one of them not UTF-8, and an empty one.
    """
    folder = tmp_path_factory.mktemp("tiny")
    text = folder / "text"
    text.mkdir()
    words = random.Random(0).choices(["def", "return", "x", "y", "=", "+", "(", ")", ":", "\n    ", "valué"], k=4000)
    for part in range(8):
        written = " ".join(words[part * 500 : (part + 1) * 500])
        (text / f"{part}.txt").write_bytes(written.encode("latin-1" if part == 0 else "utf-8"))
    (text / "empty.txt").touch()
    config = folder / "tiny.toml"
    config.write_text(TINY_RUN.format(paths=json.dumps(str(text)), stack=TINY_STACK, steps=TINY_STEPS))
    return config


@dataclass(frozen=True)
class Training:
    """The run folder of a finished ``blt train``, to be read only, and what the command printed."""

    run: Path
    finished: Finished


@pytest.fixture(scope="session")
def tiny_training(tiny_toml: Path) -> Training:
    run = tiny_toml.parent / "run"
    finished = run_blt("train", tiny_toml, "--out", run, "--json")
    assert finished.code == 0, finished.stderr
    return Training(run, finished)


@pytest.fixture
def trained_run(tiny_training: Training, tmp_path: Path) -> Path:
    """A copy of the tiny run, to do anything with."""
    return Path(shutil.copytree(tiny_training.run, tmp_path / "run"))


@pytest.fixture(scope="session")
def scored(tiny_training: Training) -> Path:
    """The entropies of the tiny run's own text, to be read only."""
    folder = tiny_training.run.parent / "scored"
    finished = run_blt("entropies", tiny_training.run, "--out", folder, "--processes", 1)
    assert finished.code == 0, finished.stderr
    return folder


@pytest.fixture
def copied(scored: Path, tmp_path: Path) -> Path:
    """A copy of them, to do anything with."""
    return Path(shutil.copytree(scored, tmp_path / "scored"))


@pytest.fixture(scope="session", autouse=True)
def short_samples() -> Iterator[None]:
    """What training writes as a sample of its progress is a few bytes: 120 take longer than a tiny run."""
    with mock.patch("blt.train.SAMPLE_BYTES", 4):
        yield

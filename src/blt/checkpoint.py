"""A run folder on disk: files that are replaced whole or not at all, and the training state that ``--resume`` reads.

State is written beside its place and renamed, so a process that dies at any moment leaves the last whole state. It is
unpickled when a run resumes: resume only runs you trust (models, which are shared, hold no pickles).
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it. Raises OSError naming the file where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None  # a failed write does not say where


@contextmanager
def files_together(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Files that replace those of a folder together, once all are written whole; the path to write each of them to.

    Where one cannot be written, what was there is untouched. Raises OSError naming the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partials: dict[str, Path] = {}

    def path_of(name: str) -> Path:
        (folder / name).parent.mkdir(exist_ok=True)
        return partials.setdefault(name, folder / f"{name}.partial")

    try:
        yield path_of
    except BaseException as error:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise OSError(
                f"the model could not be written to {folder} ({reason}); what was there is untouched"
            ) from None
        raise
    for name, partial in partials.items():
        os.replace(partial, folder / name)


@contextmanager
def naming_the_place(path: Path) -> Iterator[None]:
    """An OSError in here names the path where it names none: a failed write does not say where."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def save_state(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, Any]
) -> None:
    """Save weights, optimiser and position in the data as ``folder/step-N``; older steps go once this one is whole.

    Raises OSError naming the folder where it cannot be written; what was saved before stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_partial(folder)
    target, partial = folder / f"step-{step}", folder / f"step-{step}.partial"
    weights, moments = get_state_dict(model, optimizer)
    state = {"weights": weights, "optimizer": moments, "position": position, "step": step}
    try:
        with _one_process():
            dcp.save(state, storage_writer=dcp.FileSystemWriter(partial), no_dist=True)
    except (Exception, CheckpointException) as error:
        _remove_partial(folder)
        if _reason(error).startswith("KeyboardInterrupt"):  # a second Ctrl-C, which theirs wraps
            raise KeyboardInterrupt from None
        raise OSError(
            f"the training state could not be written to {folder} ({_reason(error)}); free some space and go on with "
            "--resume: the last whole state is untouched"
        ) from error
    if target.exists():
        shutil.rmtree(target)
    os.rename(partial, target)
    for older in saved_steps(folder)[:-1]:
        shutil.rmtree(folder / f"step-{older}")


def saved_steps(folder: Path) -> list[int]:
    """The steps that whole states exist for, in order."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def load_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Fill model and optimiser from the newest whole state; its step and its position in the data.

    ``position`` names the keys a position consists of; its values do not matter.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of another model.
    """
    steps = saved_steps(folder)
    if not steps:
        raise FileNotFoundError(f"{folder} holds no training state to resume from")
    path = folder / f"step-{steps[-1]}"
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"weights": weights, "optimizer": moments, "position": dict(position), "step": 0}
    try:
        with _one_process():
            dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    except (Exception, CheckpointException) as error:  # theirs is a BaseException
        raise ValueError(
            f"{path} is damaged or of another model ({_reason(error)}); delete it to start this part again"
        ) from error
    set_state_dict(model, optimizer, model_state_dict=state["weights"], optim_state_dict=state["optimizer"])
    return state["step"], state["position"]


@contextmanager
def _one_process() -> Iterator[None]:
    """torch warns at every save and load that it assumes a single process, which is what we mean."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _remove_partial(folder: Path) -> None:
    for leftover in folder.glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _reason(error: BaseException) -> str:
    text = str(error.__cause__ or error).strip().splitlines()
    return text[-1] if text else type(error).__name__

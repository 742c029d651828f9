"""``blt doctor`` names what is there, what is missing, and the command that fixes it."""

import sys
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch

from blt import doctor
from blt.doctor import Check, checks


def check_of(name: str) -> Check:
    return next(check for check in checks() if check.name == name)


def test_every_check_has_a_name_of_its_own_and_a_finding() -> None:
    found = checks()
    assert len({check.name for check in found}) == len(found)
    assert all(check.name and check.found for check in found)
    assert {"python", "torch", "device", "threads", "disk"} <= {check.name for check in found}


@pytest.mark.parametrize(("extra", "module"), doctor.EXTRAS.items())
def test_a_missing_extra_names_the_command_that_installs_it(
    extra: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    check = check_of(f"[{extra}]")
    assert check.found == "missing" and check.fix == f"pip install 'blt-lm[{extra}]'"


def test_a_missing_compiler_names_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang++" else None)
    assert check_of("compiler") == Check("compiler", "clang++")
    monkeypatch.setenv("CXX", "nonesuch")
    assert check_of("compiler").found == "missing" and "--compile" in check_of("compiler").fix


def test_an_old_python_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_of("python").fix == ""
    monkeypatch.setattr(doctor, "NEEDED_PYTHON", (99, 0))
    assert "install Python" in check_of("python").fix


def test_idle_cores_are_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert check_of("threads") == Check("threads", "2, 8 cores", "unset OMP_NUM_THREADS to use more")
    monkeypatch.delenv("OMP_NUM_THREADS")  # torch's own choice: it counts physical cores, and those it may use
    assert check_of("threads").fix == ""


def test_a_disk_that_is_nearly_full_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10**10, 10**10 - 10**8, 10**8))
    assert check_of("disk").found == "0.1 GB free here" and "free 2 GB" in check_of("disk").fix


def test_little_memory_is_pointed_out_and_unknown_memory_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_memory_gb", lambda: 1.0)
    assert "4 GB" in check_of("memory").fix
    monkeypatch.setattr(doctor, "_memory_gb", lambda: None)
    assert "memory" not in {check.name for check in checks()}


def test_a_graphics_card_that_this_torch_cannot_use_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert check_of("device").found == "cpu" and "pytorch.org" in check_of("device").fix
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert check_of("device").fix == ""


def test_the_command_prints_a_line_for_every_check(
    blt_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines = blt_command("doctor").stdout.decode().splitlines()
    assert [line.split()[0] for line in lines] == [check.name for check in checks()]
    assert any(line.endswith("-> pip install 'blt-lm[plot]'") for line in lines)

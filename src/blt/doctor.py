"""What this machine offers for training and running models, each gap with its fix."""

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass

EXTRAS = {"plot": "matplotlib", "eval": "lm_eval", "hf": "transformers"}
COMPILERS = ("g++", "clang++")  # where CXX names none
NEEDED_PYTHON = (3, 11)
NEEDED_DISK_GB = 2


@dataclass(frozen=True)
class Check:
    """One line of ``blt doctor``; no fix: nothing to do."""

    name: str
    found: str
    fix: str = ""


def checks() -> list[Check]:
    """Python, torch, devices, threads, memory, disk, a C++ compiler and optional extras."""
    import torch

    old = sys.version_info < NEEDED_PYTHON
    found = [
        Check("python", platform.python_version(), "install Python 3.11 or newer" if old else ""),
        Check("torch", torch.__version__),
        _device(),
    ]
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    limited = "OMP_NUM_THREADS" in os.environ and threads < cores
    found.append(Check("threads", f"{threads}, {cores} cores", "unset OMP_NUM_THREADS to use more" if limited else ""))

    memory = _memory_gb()
    if memory is not None:
        found.append(Check("memory", f"{memory:.1f} GB", "" if memory >= 4 else "the demo wants 4 GB; close something"))
    free = shutil.disk_usage(".").free / 1e9
    short = free < NEEDED_DISK_GB
    found.append(Check("disk", f"{free:.1f} GB free here", f"free {NEEDED_DISK_GB} GB for a run" if short else ""))
    compiler = next(filter(shutil.which, [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS), None)
    missing = "apt install g++, or name one in CXX: blt generate --compile needs it"
    found.append(Check("compiler", compiler or "missing", "" if compiler else missing))
    for extra, module in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        found.append(
            Check(f"[{extra}]", "there" if there else "missing", "" if there else f"pip install 'blt-lm[{extra}]'")
        )
    return found


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("device", f"cuda: {torch.cuda.get_device_name(0)}")
    if torch.backends.mps.is_available():
        return Check("device", "mps")
    nvidia = shutil.which("nvidia-smi") is not None and torch.version.cuda is None
    return Check("device", "cpu", "this torch has no CUDA: pip install torch from pytorch.org" if nvidia else "")


def _memory_gb() -> float | None:
    """Physical memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):
        return None

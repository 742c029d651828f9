"""What a process asks of the processor: to keep its memory, and the faster of two libraries for matrix products."""

import ctypes
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

FP32_ERROR = 1e-5  # of a product of random matrices, relative to its largest entry; with bf16 inside it is 3e-3


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, which asks for it again. Elsewhere nothing happens.

    Given back to the system, each page is zeroed and mapped anew: 7 to 12% of a step in bf16 (docs/log.md).
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # of malloc.h
    for option, num_bytes in ((mmap_threshold, 2**30), (trim_threshold, -1), (top_pad, 2**28)):
        set_option(option, num_bytes)


def multiply_fast_in_fp32() -> bool:
    """Let oneDNN multiply matrices in fp32 where MKL, torch's choice, leaves half of the processor idle; did it?

    That is on AMD's processors with AVX-512, on which MKL keeps to AVX2 (docs/log.md). torch has a switch for it, meant to let
    oneDNN round to bf16 inside where the processor has instructions for that; where a product then has not fp32's precision,
    everything stays as it was. Products of a single row are the one case in which MKL is faster.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in _processor():
        return False
    switch = fp32_switch()
    before, switch.fp32_precision = switch.fp32_precision, "bf16"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    is_exact = float((left @ right - exact).abs().max() / exact.abs().max()) < FP32_ERROR
    if not is_exact:
        switch.fp32_precision = before
    return is_exact


def fp32_switch() -> Any:
    """What torch lets one choose for fp32 products on a CPU: its attribute ``fp32_precision``."""
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch's module makes itself an object with it


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return ""


def product_flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of a large matrix product here: what model FLOPs utilisation is measured against."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        F.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)

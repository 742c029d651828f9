"""What the process asks of the processor: matrix products at its own speed, and in fp32 where they say so."""

from collections.abc import Iterator

import pytest
import torch

from blt import processor
from blt.processor import fp32_switch, multiply_fast_in_fp32, product_flops_per_second

SWITCH = fp32_switch()


@pytest.fixture(autouse=True)
def switch_as_it_was() -> Iterator[None]:
    before = SWITCH.fp32_precision
    SWITCH.fp32_precision = "none"
    yield
    SWITCH.fp32_precision = before


def test_the_machines_own_products_are_what_utilisation_is_measured_against() -> None:
    assert product_flops_per_second(torch.float32, torch.device("cpu")) > 1e9


def test_whichever_library_multiplies_fp32_stays_fp32() -> None:
    left, right = (torch.randn(300, 500, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    multiply_fast_in_fp32()
    expected = left.double() @ right.double().mT
    torch.testing.assert_close((left @ right.mT).double(), expected, atol=1e-4, rtol=0)


def test_processors_on_which_mkl_is_as_fast_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_processor", lambda: "vendor_id\t: GenuineIntel")
    assert not multiply_fast_in_fp32()
    assert SWITCH.fp32_precision == "none"


def test_where_the_switch_costs_precision_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bf16 in hardware: no error is small enough here."""
    monkeypatch.setattr(processor, "_processor", lambda: "vendor_id\t: AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(processor, "FP32_ERROR", 0.0)
    assert not multiply_fast_in_fp32()
    assert SWITCH.fp32_precision == "none"

"""Weight files are what safetensors and transformers read, and no more of them is in memory than asked for."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blt.checkpoint import files_together
from blt.weights_file import (
    PIECE_BYTES,
    Weight,
    all_fit_bfloat16,
    converted,
    in_memory,
    read_weights,
    rows_of,
    stacked,
    weight_files,
    write_weights,
)

MIXED = {
    "b": torch.randn(3, 5),
    "a": torch.randn(7, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "counts": torch.arange(12, dtype=torch.int16).view(3, 4),
    "c": torch.randn(2, 3, 4).half(),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 4),
}


def write(folder: Path, weights: dict[str, Tensor], shard_bytes: int = 10**9) -> list[str]:
    with files_together(folder) as path_of:
        return write_weights("model", {n: in_memory(w) for n, w in weights.items()}, path_of, shard_bytes)


def test_safetensors_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    assert write(tmp_path, MIXED) == ["model.safetensors"]
    save_file(MIXED, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours = load_file(tmp_path / "model.safetensors")
    theirs = {
        name: weight.tensor(weight.dtype) for name, weight in read_weights(tmp_path / "theirs.safetensors").items()
    }
    for found in (ours, theirs):
        assert found.keys() == MIXED.keys()
        for name, expected in MIXED.items():
            assert found[name].dtype == expected.dtype and found[name].equal(expected)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it
    written = (tmp_path / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(written[:8], "little")
    assert end % 64 == 0
    begins = {name: entry["data_offsets"][0] for name, entry in json.loads(written[8:end]).items() if "dtype" in entry}
    assert not [name for name, begin in begins.items() if begin % MIXED[name].dtype.itemsize]  # aligned, to be mapped


def test_weights_beyond_the_limit_are_split_and_an_index_tells_where_each_is(tmp_path: Path) -> None:
    weights = {f"layer.{index}": torch.full((10,), float(index)) for index in range(5)}
    names = write(tmp_path, weights, shard_bytes=80)
    files = [f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]
    assert names == [*files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200 and index["weight_map"].keys() == weights.keys()
    assert weight_files(tmp_path, "model") == [tmp_path / name for name in files]
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / file)[name].equal(weights[name])


def test_an_index_that_leads_out_of_the_folder_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ValueError, match="maps no weights to files"):
        weight_files(tmp_path, "model")


def test_a_dtype_we_do_not_know_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3).to(torch.float8_e5m2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a is stored as F8_E5M2, which cannot be read here"):
        read_weights(tmp_path / "model.safetensors")


def test_writing_holds_one_piece_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def pieces() -> Iterator[Tensor]:
        for number in range(4):
            held.append(sum(one() is not None for one in alive))
            piece = torch.full((2, 3), float(number))
            alive.append(weakref.ref(piece))
            yield piece
            del piece

    weight = Weight(torch.float32, (8, 3), pieces)
    with files_together(tmp_path) as path_of:
        write_weights("model", {"a": weight, "b": converted(weight, torch.bfloat16)}, path_of)
    assert len(held) == 8 and max(held) <= 1
    assert load_file(tmp_path / "model.safetensors")["b"][:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_large_tensor_is_written_in_parts_and_every_part_is_told(tmp_path: Path) -> None:
    rows, told = 2 * PIECE_BYTES // 4_000_000 + 1, list[int]()
    weight = in_memory(torch.zeros(1).expand(rows, 1_000_000))
    with files_together(tmp_path) as path_of:
        write_weights("model", {"a": weight}, path_of, written=told.append)
    assert sum(told) == weight.num_bytes and max(told) <= PIECE_BYTES and len(told) > 2


def test_what_is_stored_as_asked_is_mapped_and_the_file_is_never_written_to(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(1000), "b": torch.zeros(1000)})
    before = (tmp_path / "model.safetensors").read_bytes()
    weights = read_weights(tmp_path / "model.safetensors")
    mapped = weights["a"].tensor(torch.float32)
    mapped += 1
    assert mapped.eq(1).all() and (tmp_path / "model.safetensors").read_bytes() == before
    neighbour = weights["b"].tensor(torch.float32)
    apart = neighbour.untyped_storage().data_ptr() - mapped.untyped_storage().data_ptr()
    assert abs(apart) == 4000  # one mapping of the file holds both
    assert weights["b"].tensor(torch.float64).dtype == torch.float64


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5), data=st.data())
def test_rows_of_a_stack_are_those_of_the_whole(sizes: list[int], data: st.DataObject) -> None:
    parts = [torch.randn(size, 2) for size in sizes]
    whole = stacked([in_memory(part) for part in parts])
    expected = torch.cat(parts)
    assert whole.shape == expected.shape and whole.tensor(torch.float32).equal(expected)
    begin = data.draw(st.integers(0, len(expected)))
    end = data.draw(st.integers(begin, len(expected)))
    some = rows_of(whole, begin, end)
    assert some.shape == (end - begin, 2)
    assert some.tensor(torch.float32).equal(expected[begin:end])


def test_bf16_fits_only_what_it_holds_exactly() -> None:
    exact = torch.randn(20).bfloat16().float()
    assert all_fit_bfloat16(
        {"a": in_memory(exact), "whole": in_memory(torch.arange(3)), "b": in_memory(exact.bfloat16())}
    )
    one_bit_more = exact.clone()
    one_bit_more.view(torch.int32)[7] |= 1 << 15
    assert not all_fit_bfloat16({"a": in_memory(exact), "b": in_memory(one_bit_more)})
    assert not all_fit_bfloat16({"a": in_memory(exact.half())})  # fp16 has bits that bf16 has not


def test_the_check_for_bf16_ends_at_the_first_number_that_does_not_fit() -> None:
    def pieces() -> Iterator[Tensor]:
        yield torch.full((1, 2), 0.1)
        pytest.fail("read on")

    assert not all_fit_bfloat16({"a": Weight(torch.float32, (9, 2), pieces)})

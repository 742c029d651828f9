"""Weights on disk: safetensors files, split where one would exceed a size, written and read one tensor at a time.

A model of many gigabytes is never in memory twice: what is read is mapped, and what is written comes in pieces.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SHARD_BYTES = 5_000_000_000  # of weights in one file, as transformers has it
PIECE_BYTES = 64_000_000  # of a tensor at a time, where it is converted or written
DTYPES = {  # of the header of a safetensors file
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    **{f"I{8 * size}": getattr(torch, f"int{8 * size}") for size in (1, 2, 4, 8)},
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Weight:
    """A tensor wherever it lies: dtype and shape are known at once, its numbers come when they are asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]  # consecutive rows of it, in order; none of them is kept
    in_one_piece: Callable[[], Tensor] | None = None  # as it is stored, mapped from the disk where it lies there

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """All of it in this dtype, without a second copy; mapped where it is stored so and in one piece."""
        if self.in_one_piece is not None and dtype == self.dtype:
            return self.in_one_piece()
        filled, begin = torch.empty(self.shape, dtype=dtype), 0
        for piece in self.pieces():
            filled[begin : begin + len(piece)] = piece
            begin += len(piece)
        return filled


def in_memory(tensor: Tensor) -> Weight:
    """A tensor that is there."""
    tensor = tensor.detach()
    return Weight(tensor.dtype, tuple(tensor.shape), lambda: iter([tensor]), lambda: tensor)


def converted(weight: Weight, dtype: torch.dtype) -> Weight:
    """The same numbers in another dtype."""
    if dtype == weight.dtype:
        return weight
    return Weight(dtype, weight.shape, lambda: (part.to(dtype) for part in _small_pieces(weight)))


def stacked(weights: list[Weight]) -> Weight:
    """Matrices of one width as one, below each other.

    >>> stacked([in_memory(torch.ones(1, 2)), in_memory(torch.zeros(2, 2))]).tensor(torch.int8).tolist()
    [[1, 1], [0, 0], [0, 0]]
    """
    dtype = weights[0].dtype if len({weight.dtype for weight in weights}) == 1 else torch.float32
    num_rows = sum(weight.shape[0] for weight in weights)
    return Weight(
        dtype,
        (num_rows, *weights[0].shape[1:]),
        lambda: (piece for weight in weights for piece in converted(weight, dtype).pieces()),
    )


def rows_of(weight: Weight, begin: int, end: int) -> Weight:
    """Some consecutive rows of a matrix.

    >>> list(rows_of(stacked([in_memory(torch.arange(2)), in_memory(torch.arange(3))]), 1, 3).pieces())
    [tensor([1]), tensor([0])]
    """

    def pieces() -> Iterator[Tensor]:
        first = 0
        for piece in weight.pieces():
            if inside := piece[max(0, begin - first) : max(0, end - first)].shape[0]:
                yield piece[max(0, begin - first) :][:inside]
            first += len(piece)

    return Weight(weight.dtype, (end - begin, *weight.shape[1:]), pieces)


def all_fit_bfloat16(weights: Mapping[str, Weight]) -> bool:
    """Whether bf16 holds every number of every floating-point weight exactly: bf16, fp8, or fp32 of 16 zero bits.

    >>> all_fit_bfloat16({"": in_memory(torch.tensor([0.5, 3.0]))}), all_fit_bfloat16({"": in_memory(torch.tensor([0.1]))})
    (True, False)
    """
    narrow = (torch.bfloat16, torch.float8_e4m3fn)
    wide = [weight for weight in weights.values() if weight.dtype.is_floating_point and weight.dtype not in narrow]
    return all(
        weight.dtype == torch.float32 and not (part.cpu().contiguous().view(torch.int32) & 0xFFFF).any()
        for weight in wide
        for part in _small_pieces(weight)
    )


def write_weights(
    stem: str,
    weights: Mapping[str, Weight],
    path_of: Callable[[str], Path],
    shard_bytes: int = SHARD_BYTES,
    written: Callable[[int], None] = lambda num_bytes: None,
) -> list[str]:
    """Write ``stem.safetensors``, or several files and their index, named as transformers does; the names of these files.

    ``path_of`` says where each is written (see ``checkpoint.files_together``). ``written`` hears of every piece's bytes.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(weights),
        get_storage_size=lambda weight: weight.num_bytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=shard_bytes,
    )
    for name, inside in split.filename_to_tensors.items():
        _write_file(path_of(name), {key: weights[key] for key in inside}, written)
    names = list(split.filename_to_tensors)
    if split.is_sharded:
        index = index_name(stem)
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path_of(index).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
        names.append(index)
    return names


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The one file of weights, or the several that an index names. Raises FileNotFoundError, or ValueError for the index."""
    if (folder / f"{stem}.safetensors").is_file():
        return [folder / f"{stem}.safetensors"]
    index = folder / index_name(stem)
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            if not names or any(Path(name).name != name for name in names):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{index} is damaged, it maps no weights to files; copy the model again") from None
        return [folder / name for name in names]
    pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    because = f"; {pickles[0]} may be a pickle, which could run code and is not read" if pickles else ""
    raise FileNotFoundError(f"{folder} holds no {stem}.safetensors{because}")


def read_weights(file: Path) -> dict[str, Weight]:
    """The weights of one safetensors file. Raises ValueError for one that is damaged."""

    def opened() -> safe_open:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or no safetensors file ({error}); copy the model again") from None

    kept = cache(opened)  # tensors that stay share one mapping; a piece has a mapping of its own, which goes with it

    def weight(name: str) -> Weight:
        header = kept().get_slice(name)
        if header.get_dtype() not in DTYPES:
            raise ValueError(f"{file}: {name} is stored as {header.get_dtype()}, which cannot be read here")

        def pieces() -> Iterator[Tensor]:
            yield opened().get_tensor(name)

        dtype, shape = DTYPES[header.get_dtype()], tuple(header.get_shape())
        return Weight(dtype, shape, pieces, lambda: kept().get_tensor(name))

    return {name: weight(name) for name in kept().keys()}  # noqa: SIM118  (a reader, not a dict)


def _write_file(path: Path, weights: Mapping[str, Weight], written: Callable[[int], None]) -> None:
    """The length of a JSON header, the header, and the numbers, those of wide dtypes first so that all are aligned."""
    order = sorted(weights, key=lambda name: (-weights[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + weights[name].num_bytes
        dtype, shape = DTYPE_NAMES[weights[name].dtype], list(weights[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(len(encoded) + 8) % 64)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            for part in _small_pieces(weights[name]):
                numbers = part.cpu().contiguous().flatten().view(torch.uint8).numpy()
                file.write(numbers.data)
                written(numbers.nbytes)
        assert file.tell() == 8 + len(encoded) + end


def _small_pieces(weight: Weight) -> Iterator[Tensor]:
    """Its pieces, cut once more where they are large."""
    row_bytes = max(1, weight.num_bytes // max(1, weight.shape[0]))
    for piece in weight.pieces():
        yield from piece.split(max(1, PIECE_BYTES // row_bytes))

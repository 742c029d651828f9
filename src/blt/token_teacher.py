"""What a token model thinks of the next byte, so that a network of bytes can learn from it (distillation).

A token model predicts whole tokens. Its probability that a text goes on with a byte is the sum over the tokens that would put
it there. Inside a token, after its first j bytes, these are the tokens that begin with the same j bytes and have that byte
next; and if those j bytes are a token themselves, which may end there, the tokens that may follow it and begin with the byte.
Other ways to cut the j bytes into several tokens, which a tokenizer would not choose but for what follows, are left out, and
the sum is divided by the probability of what is not left out.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from blt.byte_ids import BYTE_OFFSET, EOS, VOCAB_SIZE, decode, incomplete_suffix_length
from blt.shapes import ByteIds, Logits
from blt.tokenizer_files import byte_letters

ByteProbabilities = Float[Tensor, "batch byte vocab"]  # entry t is about id t + 1
IsTaught = Bool[Tensor, "batch byte"]
MISSING = "a token teacher needs transformers: pip install 'blt-lm[hf]' -c constraints.txt"


class Piece(NamedTuple):
    """A stretch of one document in a row, as tokens."""

    first: int  # position of the input after which its first byte comes
    data: bytes
    tokens: list[int]


class Vocabulary:
    """The bytes that each token stands for, in an order in which all tokens with the same beginning are neighbours."""

    def __init__(self, bytes_of: Sequence[bytes]) -> None:
        """``bytes_of``: of each token, empty for one that stands for no text."""
        self.order = sorted(range(len(bytes_of)), key=lambda token: bytes_of[token])
        self.sorted_bytes = [bytes_of[token] for token in self.order]
        self.bytes_of = bytes_of
        self.token_of = {data: token for token, data in enumerate(bytes_of) if data}
        self._bounds: dict[bytes, list[int]] = {}

    def bounds(self, beginning: bytes) -> list[int]:
        """Between which places of the order the tokens lie that go on with byte 0, 1, ..., 255 after a beginning: 257 places.

        >>> Vocabulary([b"", b"a", b"ab", b"b", b"aa"]).bounds(b"a")[96:100]
        [2, 2, 3, 4]
        """
        if beginning not in self._bounds:
            places = [bisect_left(self.sorted_bytes, beginning + bytes([byte])) for byte in range(256)]
            last = places[255]  # from here on those that go on with byte 255
            while last < len(self.sorted_bytes) and self.sorted_bytes[last].startswith(beginning + b"\xff"):
                last += 1
            self._bounds[beginning] = [*places, last]
        return self._bounds[beginning]


class TokenTeacher:
    """A token model of ``transformers`` and its byte-level tokenizer."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, vocabulary: Vocabulary, bos: int | None, eos: int | None
    ) -> None:
        self.model, self.tokenizer, self.vocabulary = model, tokenizer, vocabulary
        self.bos, self.eos = bos, eos
        self.order = torch.tensor(vocabulary.order)
        self.read_bytes, self.read_tokens = 0, 0  # so far, tokens that were read as alternatives included

    @torch.no_grad()
    def next_bytes(self, inputs: ByteIds) -> tuple[ByteProbabilities, IsTaught]:
        """Probabilities of the id after each input, and where there are any: not after bytes that are no UTF-8."""
        probabilities = torch.zeros(*inputs.shape, VOCAB_SIZE)
        is_taught = torch.zeros(inputs.shape, dtype=torch.bool)
        for row, ids in enumerate(inputs.tolist()):
            for piece in self._pieces(ids):
                positions, found = self._probabilities(piece)
                probabilities[row, positions] = found.float()
                is_taught[row, positions] = True
        return probabilities.to(inputs.device), is_taught.to(inputs.device)

    def _pieces(self, ids: list[int]) -> list[Piece]:
        """The documents of a row, each without the parts of characters that the row's ends have cut."""
        found, begin = [], 0
        for end in [*(place for place, byte_id in enumerate(ids) if byte_id == EOS), len(ids)]:
            data = decode(ids[begin:end])
            first = begin + (end - begin - len(data)) - 1  # the last control id before the text
            cut = next((size for size in range(min(3, len(data))) if not 0x80 <= data[size] < 0xC0), 0)
            whole = data[cut : len(data) - incomplete_suffix_length(data)]
            try:
                text = whole.decode("utf-8")
            except UnicodeDecodeError:
                text = ""
            if text and first >= 0:
                tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
                if b"".join(self.vocabulary.bytes_of[token] for token in tokens) == whole:
                    found.append(Piece(first + cut, whole, tokens))
            begin = end + 1
        return found

    def _probabilities(self, piece: Piece) -> tuple[Int[Tensor, " byte"], Float[Tensor, "byte vocab"]]:
        """The positions of a row at which a piece's next bytes are predicted, and their probabilities."""
        vocabulary, tokens = self.vocabulary, piece.tokens
        beginnings: list[tuple[int, bytes]] = []  # of each byte: its token's number, and the token's bytes before it
        for number, token in enumerate(tokens):
            data = vocabulary.bytes_of[token]
            beginnings += [(number, data[:size]) for size in range(len(data))]
        beginnings.append((len(tokens), b""))
        if self.bos is None:  # nothing predicts the first token
            beginnings = [entry for entry in beginnings if entry[0] > 0]
        ending = [
            (place, number, vocabulary.token_of[data])
            for place, (number, data) in enumerate(beginnings)
            if data in vocabulary.token_of
        ]
        after, after_ending = self._predictions(tokens, [(number, token) for _, number, token in ending])
        first_row = 0 if self.bos is not None else 1
        rows = torch.tensor([number - first_row for number, _ in beginnings])
        mass = F.pad(after[:, self.order].cumsum(1), (1, 0))
        bounds = torch.tensor([vocabulary.bounds(data) for _, data in beginnings])
        masses = mass[rows[:, None], bounds].diff(dim=1)
        found = torch.zeros(len(beginnings), VOCAB_SIZE, dtype=torch.float64)
        found[:, BYTE_OFFSET:] = masses
        at_token_starts = torch.tensor([not data for _, data in beginnings])
        if self.eos is not None:
            found[at_token_starts, EOS] = after[rows[at_token_starts], self.eos]
        if ending:
            places = torch.tensor([place for place, _, _ in ending])
            weight = after[rows[places], torch.tensor([token for _, _, token in ending])]
            begins = F.pad(after_ending[:, self.order].cumsum(1), (1, 0))[:, torch.tensor(vocabulary.bounds(b""))].diff(
                dim=1
            )
            found[places, BYTE_OFFSET:] += weight[:, None] * begins
            if self.eos is not None:
                found[places, EOS] += weight * after_ending[:, self.eos]
        skipped = len(piece.data) + 1 - len(beginnings)
        positions = torch.arange(len(beginnings)) + piece.first + skipped
        return positions, found / found.sum(1, keepdim=True)

    def _predictions(
        self, tokens: list[int], ending: list[tuple[int, int]]
    ) -> tuple[Float[Tensor, "token vocabulary"], Float[Tensor, "branch vocabulary"]]:
        """The probabilities of each token and of what follows the last; and of what would follow other tokens.

        ``ending``: such another token, and the number of the one in whose place it stands. All are read in one pass: the others
        stand behind the text, each at the position that it takes, and read what is before it there and nothing else.
        """
        self.read_bytes += sum(len(self.vocabulary.bytes_of[token]) for token in tokens)
        self.read_tokens += len(tokens) + len(ending)
        row = ([] if self.bos is None else [self.bos]) + tokens
        offset = len(row) - len(tokens)
        main, total = len(row), len(row) + len(ending)
        places = torch.tensor([offset + number for number, _ in ending], dtype=torch.long)
        may_attend = torch.zeros(total, total, dtype=torch.bool)
        may_attend[:main, :main] = torch.ones(main, main, dtype=torch.bool).tril()
        may_attend[main:, :main] = torch.arange(main)[None] < places[:, None]
        may_attend.fill_diagonal_(True)
        device = next(self.model.parameters()).device
        dtype = next(self.model.parameters()).dtype
        mask = torch.zeros(total, total).masked_fill(~may_attend, torch.finfo(torch.float32).min)
        logits = self.model(
            input_ids=torch.tensor([row + [token for _, token in ending]], device=device),
            position_ids=torch.cat([torch.arange(main), places])[None].to(device),
            attention_mask=mask[None, None].to(dtype).to(device),
            use_cache=False,
        ).logits[0]
        probabilities = logits.double().softmax(-1).cpu()
        return probabilities[:main], probabilities[main:]


@dataclass(frozen=True)
class Lesson:
    """What a network minimises where a teacher has a share in it."""

    teacher: TokenTeacher
    weight: float

    def objective(self, logits: Logits, inputs: ByteIds, targets: ByteIds, nats: Tensor) -> Tensor:
        """A part of the nats of the text, and for the rest the cross-entropy with what the teacher expects."""
        with torch.autocast(inputs.device.type, enabled=False):
            expected, is_taught = self.teacher.next_bytes(inputs)
        return (1 - self.weight) * nats + self.weight * taught_loss(logits, expected, is_taught, targets)

    @property
    def flops_per_byte(self) -> float:
        """Of the teacher, as far as it has read: two for each weight of its matrices and token that it reads."""
        matrices = sum(part.weight.numel() for part in self.teacher.model.modules() if isinstance(part, nn.Linear))
        return 2 * matrices * self.teacher.read_tokens / max(1, self.teacher.read_bytes)


def taught_loss(logits: Logits, taught: ByteProbabilities, is_taught: IsTaught, targets: ByteIds) -> Tensor:
    """Summed cross-entropy (nats) with a teacher's probabilities where there are any, with the text's next id elsewhere; of
    what ``optimise.next_id_loss`` counts.
    """
    is_target = targets > 1
    wanted = torch.where(is_taught[..., None], taught, F.one_hot(targets, VOCAB_SIZE).to(taught))
    return F.cross_entropy(logits[is_target].float(), wanted[is_target], reduction="sum")


def load_token_teacher(folder: str | Path, device: torch.device) -> TokenTeacher:
    """The teacher in a folder of ``transformers``' format, in fp32 on a CPU, in bf16 elsewhere.

    Raises FileNotFoundError or ValueError for a folder without a model, a tokenizer that is not byte-level, a missing package.
    """
    folder = Path(folder)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no token model: there is no {name} in it")
    try:
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError(MISSING) from None
    try:
        described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{folder / 'tokenizer.json'} is damaged, it is not JSON ({error}); copy the model again"
        ) from None
    if '"ByteLevel"' not in json.dumps(described.get("decoder") if isinstance(described, dict) else None):
        raise ValueError(
            f"the tokenizer in {folder} is not byte-level, so nobody can say which bytes its tokens stand for"
        )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # whatever transformers and its libraries raise for a folder that is damaged
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise ValueError(f"the token model in {folder} could not be loaded ({reason}); copy it again") from error
    model = model.to(device).eval().requires_grad_(False)
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # what looks like one in a text is text
    is_special = {entry["content"]: bool(entry.get("special")) for entry in described.get("added_tokens", [])}
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    bytes_of = [b""] * model.config.vocab_size
    for name, token in tokenizer.get_vocab().items():
        if name not in is_special:
            bytes_of[token] = bytes(byte_of[letter] for letter in name)
        elif not is_special[name]:  # added as text
            bytes_of[token] = name.encode()
    eos = model.config.eos_token_id
    return TokenTeacher(
        model, tokenizer, Vocabulary(bytes_of), model.config.bos_token_id, eos[0] if isinstance(eos, list) else eos
    )

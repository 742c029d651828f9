"""A byte-level BPE that the ``tokenizers`` library learns from a benchmark's own text, and its merges for ``tiktoken``."""

from collections.abc import Sequence
from typing import Any

BOS = 1  # of ours too; ids 0 and 1 are no text, so that a trainer of byte models skips the same ids in both
SPECIAL = ("<boe>", "<bos>")
VOCABULARY = 4096


def learn(texts: Sequence[str], vocabulary: int = VOCABULARY) -> Any:
    """A ``tokenizers.Tokenizer`` of so many ids, the two special ones included; it splits text as GPT-2's does."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError(missing("tokenizers")) from None

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_tiktoken(tokenizer: Any) -> Any:
    """A ``tiktoken.Encoding`` with the same ids: an id's rank is its own number, as merges were numbered in order."""
    try:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str
    except ImportError:
        raise ValueError(missing("tiktoken")) from None

    ranks = {piece: number for number, piece in enumerate(pieces(tokenizer)) if number >= len(SPECIAL)}
    return tiktoken.Encoding("learned", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def pieces(tokenizer: Any) -> list[bytes]:
    """The bytes that each id stands for; of the special ones none."""
    byte_of, vocabulary = _byte_of_character(), tokenizer.get_vocab()
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    return [b"" if name in SPECIAL else bytes(byte_of[character] for character in name) for name in names]


def missing(package: str) -> str:
    return f"{package} is not installed, which this comparison needs: pip install 'blt-lm[bench]' -c constraints.txt"


def _byte_of_character() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable Latin-1 as itself, the others as characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}

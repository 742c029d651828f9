"""Our byte ids as the files that ``transformers.AutoTokenizer`` reads, written by hand: every byte a symbol, no merges."""

from typing import Any

from blt.byte_ids import BOS, BYTE_OFFSET

SPECIAL = ("<boe>", "<s>", "</s>", "<pad>")  # ids 0 to 3; the names are those of transformers' own files for BLT


def tokenizer_files(max_bytes: int) -> dict[str, dict[str, Any]]:
    """The contents of tokenizer.json and tokenizer_config.json: text -> BOS and its bytes' ids, as ``byte_ids.encode``.

    The name of a special id in a text is plain bytes (``split_special_tokens``), and no id is decoded into other than its byte.
    """
    bytes_as_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    bos, first, second = (
        {"SpecialToken": {"id": SPECIAL[BOS], "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 0}},
    )
    vocabulary = {name: number for number, name in enumerate(SPECIAL)}
    vocabulary |= {letter: byte + BYTE_OFFSET for byte, letter in enumerate(byte_letters())}
    rules: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": name, **flags, "special": True} for number, name in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": bytes_as_letters,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {SPECIAL[BOS]: {"id": SPECIAL[BOS], "ids": [BOS], "tokens": [SPECIAL[BOS]]}},
        },
        "decoder": bytes_as_letters,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    boe, bos_name, eos_name, pad = SPECIAL
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos_name,
        "eos_token": eos_name,
        "pad_token": pad,
        "additional_special_tokens": [boe],
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_bytes,
    }
    return {"tokenizer.json": rules, "tokenizer_config.json": settings}


def byte_letters() -> list[str]:
    """The character that stands for each byte in such files: itself where Latin-1 prints it, else the next free one from 256.

    >>> letters = byte_letters()
    >>> letters[65], letters[0], letters[32], letters[173], len(set(letters))
    ('A', 'Ā', 'Ġ', 'Ń', 256)
    """
    printed = {*range(33, 127), *range(161, 256)} - {173}  # 173 is the soft hyphen
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]

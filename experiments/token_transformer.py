"""What Byte Latent Transformers are compared with: one plain transformer over tokens of a BPE, or over bytes.

It is built from the package's own layers and trained by its own loop, so that two contenders differ in what they are and
in nothing else. Ids are those of bytes: 0 padding, 1 BOS, 2 EOS, then the tokens from 4 on.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from blt.byte_ids import BOS, BYTE_OFFSET, document_ids, encode
from blt.checkpoint import saved_steps
from blt.config import HashEmbeddingsConfig, TrainingConfig, TransformerConfig
from blt.corpus import ByteShard
from blt.evaluate import Score, score_ids
from blt.flops import token_model_flops_per_byte
from blt.model.hash_embeddings import HashEmbeddings
from blt.model.kv_cache import KeyValueCache, Span
from blt.model.linear import Linear
from blt.model.norm import RMSNorm
from blt.model.transformer import Transformer, initialise
from blt.optimise import Job, Loss, Metrics, next_id_loss, optimise, stop_after_this_step
from blt.progress import Reporter
from blt.train import fit_filter

CPU = torch.device("cpu")


class TokenTransformer(nn.Module):
    """Embedding, with tables those of hashed n-grams of ids on top, transformer, norm, untied head."""

    def __init__(self, config: TransformerConfig, num_ids: int, tables: HashEmbeddingsConfig | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_ids, config.width)
        self.hash_embeddings = None if tables is None else HashEmbeddings(tables, config.width)
        self.transformer = Transformer(config)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = Linear(config.width, num_ids)

    def forward(self, ids: Tensor) -> Tensor:
        return self.predict(self.transformer(self.embed(ids), document_ids(ids)))

    def embed(self, ids: Tensor) -> Tensor:
        embedded = self.embedding(ids)
        return embedded if self.hash_embeddings is None else embedded + self.hash_embeddings(ids)

    def predict(self, states: Tensor) -> Tensor:
        """Logits, from the last layer's states."""
        logits = self.head(self.norm(states))
        assert isinstance(logits, Tensor)
        return logits


@dataclass(frozen=True, eq=False)
class TokenModel:
    """A transformer and how it reads text: by the tokenizer, or without one byte by byte."""

    network: TokenTransformer
    config: TransformerConfig
    tokenizer: Tokenizer | None
    window_ids: int  # positions of a row in training, and in scoring

    @property
    def num_ids(self) -> int:
        return num_ids(self.tokenizer)

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.network.parameters())

    def ids(self, text: bytes) -> list[int]:
        """BOS, then the text's tokens; a tokenizer reads what is not UTF-8 as U+FFFD."""
        if self.tokenizer is None:
            return encode(text)
        return [BOS, *(BYTE_OFFSET + token for token in self.tokenizer.encode(text.decode("utf-8", "replace")).ids)]

    def scores(self, documents: Sequence[bytes], prompts: Sequence[bytes] | None = None) -> list[Score]:
        """The bits of each document, after its prompt, over its bytes; its patches are its tokens."""
        self.network.eval()
        before = [self.ids(prompt) for prompt in prompts or [b""] * len(documents)]
        rows = [prompt + self.ids(document)[1:] for prompt, document in zip(before, documents, strict=True)]
        found = score_ids(
            self._predict, rows, self.window_ids, CPU, prompt_bytes=[len(prompt) - 1 for prompt in before]
        )
        return [
            Score(bytes=len(document), bits=score.bits, patches=score.bytes)
            for document, score in zip(documents, found, strict=True)
        ]

    @torch.no_grad()
    def greedy(self, prompt: bytes, max_tokens: int, stop: bytes) -> bytes:
        """What the model writes after a prompt, up to the bytes ``stop``; keys and values are kept."""
        assert self.tokenizer is not None
        cache, new, tokens = KeyValueCache(self.config, 1, CPU, torch.float32), self.ids(prompt), list[int]()
        ids, written = list[int](), b""
        while len(tokens) < max_tokens and stop not in written:
            place = cache.place([0], [Span(len(ids), [0] * len(new))], len(new))
            ids += new
            embedded = self.network.embed(torch.tensor([ids]))[:, -len(new) :]  # an n-gram may begin in older ids
            states = self.network.transformer.extend(embedded, (cache, place))
            new = [int(self.network.predict(states[:, -1:])[0, -1, BYTE_OFFSET:].argmax()) + BYTE_OFFSET]
            tokens.append(new[0] - BYTE_OFFSET)
            written = self.tokenizer.decode(tokens).encode()
        return written.partition(stop)[0]

    def _predict(self, ids: Tensor) -> tuple[Tensor, None, Tensor]:
        return self.network(ids), None, torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.bool)


def num_ids(tokenizer: Tokenizer | None) -> int:
    return BYTE_OFFSET + (256 if tokenizer is None else tokenizer.get_vocab_size())


def learned_bpe(texts: Iterable[str], vocabulary: int, file: Path) -> Tokenizer:
    """A byte-level BPE of these texts, split as GPT-2 splits them; kept in the file."""
    if file.exists():
        return Tokenizer.from_file(str(file))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))
    return tokenizer


def in_tokens(shard: ByteShard, tokenizer: Tokenizer) -> ByteShard:
    """The shard's documents in tokens. Its "bytes" are tokens from here on: rows are cut, shuffled and read as bytes are."""
    texts = [document.data.decode("utf-8", "replace") for document in shard.documents()]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    offsets = np.cumsum([0, *map(len, encoded)])
    tokens = np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded])
    return replace(shard, data=tokens, offsets=offsets)


def equal_flops_config(
    like: TransformerConfig, wanted: float, row_bytes: int, bytes_per_token: float, vocabulary: int
) -> TransformerConfig:
    """A transformer of this width whose forward pass, its head with it, costs ``wanted`` FLOPs per byte.

    As many layers as come nearest, then a feed-forward width, a multiple of 8, that makes up for the rest.
    """

    def distance(config: TransformerConfig) -> float:
        return abs(token_model_flops_per_byte(config, row_bytes, bytes_per_token, vocabulary) / wanted - 1)

    deep = min((like.model_copy(update={"num_layers": layers}) for layers in range(1, 100)), key=distance)
    found = min(
        (deep.model_copy(update={"ffn_width": width}) for width in range(8, 4 * like.ffn_width, 8)), key=distance
    )
    if distance(found) > 0.01:
        raise ValueError(
            f"no transformer of width {like.width} with {vocabulary} ids costs {wanted:.3g} FLOPs per byte; "
            "take a smaller width or vocabulary"
        )
    return found


def train_token_model(
    folder: Path,
    shard: ByteShard,
    held_out: Sequence[bytes],
    config: TransformerConfig,
    tokenizer: Tokenizer | None,
    training: TrainingConfig,
    reporter: Reporter,
    tables: HashEmbeddingsConfig | None = None,
) -> TokenModel:
    """Train on a shard, of bytes or tokens, or go on where the folder was left."""
    torch.manual_seed(training.seed)
    model = TokenModel(TokenTransformer(config, num_ids(tokenizer), tables), config, tokenizer, training.row_bytes)
    initialise(model.network, torch.Generator().manual_seed(training.seed))
    if tables is not None and tables.min_count > 1 and not saved_steps(folder / "state"):
        assert model.network.hash_embeddings is not None
        fit_filter(model.network.hash_embeddings, shard, training.row_bytes, reporter)
    folder.mkdir(parents=True, exist_ok=True)
    per_id = 3 * token_model_flops_per_byte(config, training.row_bytes, 1, num_ids(tokenizer))

    def loss(inputs: Tensor, targets: Tensor, _: Tensor | None) -> Loss:
        nats = next_id_loss(model.network(inputs), targets)
        return Loss(nats, nats, patches=0)

    def evaluate() -> dict[str, Any]:
        scores = model.scores(held_out)
        bits, num_bytes = sum(score.bits for score in scores), sum(score.bytes for score in scores)
        return {"valid_bits_per_byte": bits / max(1, num_bytes)}

    def save() -> None:
        save_file(model.network.state_dict(), folder / "model.safetensors")

    if tokenizer is not None:
        reporter.say("network: what progress says of bytes is said of tokens here; scores are per byte")
    job = Job("network", model.network, training, folder / "state", loss, evaluate, save, lambda _: per_id)
    with stop_after_this_step() as stop_requested:
        optimise(job, shard, Metrics(folder / "metrics.jsonl"), reporter, stop_requested)
    shape = {"config": config.model_dump(), "window_ids": training.row_bytes, "tokenizer": tokenizer is not None}
    shape |= {"tables": tables.model_dump(mode="json") if tables else None}
    (folder / "model.json").write_text(json.dumps(shape, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    return model


def load_token_model(folder: Path) -> TokenModel:
    """What ``train_token_model`` left in a folder."""
    shape = json.loads((folder / "model.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")) if shape["tokenizer"] else None
    config = TransformerConfig.model_validate(shape["config"])
    tables = HashEmbeddingsConfig.model_validate(shape["tables"]) if shape.get("tables") else None
    network = TokenTransformer(config, num_ids(tokenizer), tables)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return TokenModel(network.eval(), config, tokenizer, shape["window_ids"])


def training_flops(model: TokenModel, row_bytes: int, bytes_per_id: float) -> float:
    """Of one byte of text, forward and backward."""
    return 3 * token_model_flops_per_byte(model.config, row_bytes, bytes_per_id, model.num_ids)


def ids_per_row(row_bytes: int, bytes_per_id: float) -> int:
    """Positions that hold as many bytes of text as a row of bytes does.

    >>> ids_per_row(512, 4.0), ids_per_row(512, 1.0)
    (128, 512)
    """
    return math.ceil(row_bytes / bytes_per_id)

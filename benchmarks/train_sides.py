"""What ``train.py`` lets learn: ours, transformers' BLT with the same weights, and a token model of equal FLOPs per byte.

Ours and the token model are updated by ``blt.optimise``: the optimiser and the step of ``blt train``. Each side makes one
update from the rows that it is given, as many bytes as they hold.
"""

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from decode_sides import shape
from torch import Tensor, nn

from blt.byte_ids import BOS, BYTE_OFFSET
from blt.config import (
    EntropyModelConfig,
    HashEmbeddingsConfig,
    ModelConfig,
    PatchingConfig,
    TrainingConfig,
    TransformerConfig,
    validated,
)
from blt.config_file import read_run_config
from blt.documents import read_documents
from blt.flops import FlopsPerByte, flops_per_byte, token_model_flops_per_byte
from blt.language_model import LanguageModel
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel
from blt.model.linear import Linear
from blt.model.norm import RMSNorm
from blt.model.patching import threshold_for_patch_size
from blt.model.transformer import Transformer, initialise
from blt.model_files import save_model
from blt.optimise import Job, Loss, ReportWindow, build_optimizer, next_id_loss, prepare, train_step
from blt.processor import fp32_switch
from blt.train import resolve_dtype

PATCH_BYTES = 4.5  # what each case's threshold is calibrated to
LONGEST_ROW = 32_768
LEARNING_RATE = 1e-4
SAME_LOSS = 1e-4  # nats per byte


@dataclass(frozen=True)
class Mode:
    """How ours and the token model are trained: the dtype of products, and what ``--set`` says."""

    dtype: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    def training(self, row_bytes: int, rows: int) -> TrainingConfig:
        """The config of such steps. Raises ValueError for an option that training does not have."""
        values = {
            "total_bytes": 10**9,
            "row_bytes": row_bytes,
            "rows_per_step": rows,
            "learning_rate": LEARNING_RATE,
            "dtype": self.dtype,
            **self.options,
        }
        return resolve_dtype(validated(TrainingConfig, values, "--set"), torch.device("cpu"))


@dataclass(frozen=True)
class Step:
    """One update, and what it cost."""

    num_bytes: int
    seconds: float
    patches: int = 0


class Text:
    """Documents end to end; rows begin anywhere in it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long() + BYTE_OFFSET

    @classmethod
    def read(cls, path: str, num_bytes: int) -> "Text":
        """So many bytes of the documents of a path, drawn with a seed; all of them where there are less."""
        documents = [document.data for document in read_documents([path])]
        random.Random(0).shuffle(documents)
        data = b"".join(documents)[:num_bytes]
        if not data:
            raise ValueError(f"{path} holds no text; give another --data")
        return cls(data * -(-2 * LONGEST_ROW // len(data)))

    def rows(self, row_bytes: int, rows: int, seed: int) -> Tensor:
        """Rows of ``row_bytes + 1`` ids, BOS first, each of one document as far as the model is told."""
        generator = torch.Generator().manual_seed(seed)
        begins = torch.randint(len(self.ids) - row_bytes, (rows,), generator=generator).tolist()
        return torch.stack([torch.cat([torch.tensor([BOS]), self.ids[begin : begin + row_bytes]]) for begin in begins])


class Trainer:
    """A network and its optimiser, updated as ``blt train`` does. The one place that knows what a Job looks like."""

    def __init__(
        self, network: nn.Module, training: TrainingConfig, loss: Callable[[Tensor, Tensor], tuple[Tensor, int]]
    ) -> None:
        def summed(inputs: Tensor, targets: Tensor, _: Tensor | None) -> Loss:
            nats, patches = loss(inputs, targets)
            return Loss(nats, nats, patches)

        self.network = network.train()
        prepare(network, training)
        self.optimizer = build_optimizer(network, training)
        self.job = Job(
            name="benchmark",
            model=network,
            config=training,
            state_folder=Path("nowhere"),
            loss=summed,
            evaluate=dict,
            save_model=lambda: None,
            flops_per_byte=lambda mean_patch: math.nan,
        )

    def update(self, rows: Tensor) -> tuple[float, int]:
        """Seconds of a step on these rows, and patches in them."""
        window = ReportWindow()
        begin = time.perf_counter()
        train_step(self.job, self.optimizer, rows[:, :-1], rows[:, 1:], None, window)
        return time.perf_counter() - begin, window.patches

    @property
    def dtype(self) -> str:
        """Of matrix products, as it was resolved."""
        return self.job.config.dtype

    def kept_bytes(self) -> int:
        """Weights and the optimiser's state."""
        return _kept_bytes(self.network, self.optimizer)


class Ours:
    """A Byte Latent Transformer that learns; its entropy model, frozen, says in every step where patches start.

    ``precomputed``: entropies were worked out before, as for a corpus that is read many times, and cost the step nothing.
    """

    def __init__(self, config: ModelConfig, mode: Mode) -> None:
        self.models, self.precomputed = random_models(config), False
        self.starts: Tensor | None = None
        self.trainer = Trainer(self.models.network, mode.training(512, 1), self._loss)

    def step(self, rows: Tensor) -> Step:
        self.starts = self.models.patch_starts(rows[:, :-1]) if self.precomputed else None
        seconds, patches = self.trainer.update(rows)
        return Step(rows[:, 1:].numel(), seconds, patches)

    @property
    def dtype(self) -> str:
        return self.trainer.dtype

    def set_threshold(self, threshold_nats: float) -> None:
        patching = PatchingConfig(threshold_nats=threshold_nats)
        self.models.config = self.models.config.model_copy(update={"patching": patching})

    def threshold_for(self, rows: Tensor) -> float:
        """What cuts these rows into patches of 4.5 bytes, as far from any entropy as it can be there: sums in another order
        must not move one across it.
        """
        entropies = torch.cat([self.models.entropies(row[None, :-1]) for row in rows])
        threshold = threshold_for_patch_size(entropies, rows[:, :-1], PatchingConfig(), PATCH_BYTES)
        values = entropies[~entropies.isnan()].double()
        below, above = values[values <= threshold], values[values > threshold]
        return float(below.max() + above.min()) / 2 if len(below) and len(above) else threshold

    def flops(self, row_bytes: int) -> FlopsPerByte:
        return flops_per_byte(self.models.config, PATCH_BYTES, row_bytes)

    @torch.no_grad()
    def loss(self, row: Tensor) -> float:
        """Nats per id of a row, its last id left out, as transformers' loss leaves it out."""
        inputs = row[:, :-1]
        logits = self.models.network(inputs, self.models.patch_starts(inputs))
        return float(next_id_loss(logits[:, :-1], inputs[:, 1:])) / (inputs.shape[1] - 1)

    def kept_bytes(self) -> int:
        assert self.models.entropy_model is not None
        return self.trainer.kept_bytes() + _weight_bytes(self.models.entropy_model)

    def _loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        starts = self.models.patch_starts(inputs) if self.starts is None else self.starts
        patches = int((starts[:, :-1] & (inputs >= BYTE_OFFSET)).sum())
        return next_id_loss(self.models.network(inputs, starts), targets), patches


class HuggingFaceBlt:
    """Transformers' BLT with the weights and the threshold of ours: labels in, loss, backward, clipping, fused AdamW.

    Its entropy model computes in fp32, as ours always does: rounded entropies would cut at other places.
    """

    def __init__(self, models: LanguageModel, mode: Mode) -> None:
        from transformers import BltForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        training = mode.training(512, 1)
        self.dtype, self.clip_norm = training.dtype, training.clip_norm
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), models.config, models.entropy_model, models.network)
            self.model = BltForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
            for weight in self.model.parameters():
                weight.data = weight.data.clone()  # in memory now, and not only in the file when first asked for
        for weight in self.model.model.patcher.parameters():
            weight.requires_grad_(False)  # frozen, as ours is
        self.model.model.patcher.forward = without_autocast(self.model.model.patcher.forward)
        self.learns = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learns, lr=LEARNING_RATE, fused=True)

    def step(self, rows: Tensor) -> Step:
        with products_as_torch_comes():
            return self._step(rows)

    def _step(self, rows: Tensor) -> Step:
        begin = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = self._loss(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.learns, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Step(rows[:, 1:].numel(), time.perf_counter() - begin)

    def set_threshold(self, threshold_nats: float) -> None:
        self.model.model.config.patching_threshold = threshold_nats

    @torch.no_grad()
    def loss(self, row: Tensor) -> float:
        return float(self._loss(row))

    def kept_bytes(self) -> int:
        return _kept_bytes(self.model, self.optimizer)

    def _loss(self, rows: Tensor) -> Tensor:
        loss = self.model(input_ids=rows[:, :-1], labels=rows[:, :-1], use_cache=False).loss
        assert isinstance(loss, Tensor)
        return loss


@contextmanager
def products_as_torch_comes() -> Iterator[None]:
    """Without the library for fp32 products that our trainer asks for: whoever trains with transformers has not asked."""
    switch = fp32_switch()
    before, switch.fp32_precision = switch.fp32_precision, "none"
    try:
        yield
    finally:
        switch.fp32_precision = before


def without_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same, in the dtype of its weights wherever it is called."""

    def in_own_dtype(*arguments: Any, **options: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return forward(*arguments, **options)

    return in_own_dtype


def require_same_loss(ours: Ours, theirs: HuggingFaceBlt, row: Tensor) -> float:
    """The difference of both losses on a row, nats per byte. Raises ValueError where they do not compute the same."""
    difference = abs(ours.loss(row) - theirs.loss(row))
    if not difference <= SAME_LOSS:
        raise ValueError(f"ours and transformers' BLT differ by {difference:.2g} nats per byte: nothing to compare")
    return difference


class TokenTransformer(nn.Module):
    """Embedding, our transformer, norm, head."""

    def __init__(self, config: TransformerConfig, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.transformer = Transformer(config)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = Linear(config.width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.norm(self.transformer(self.embedding(ids), torch.zeros_like(ids))))
        assert isinstance(logits, Tensor)
        return logits


class TokenText:
    """The same text in tokens, and how many bytes each stands for."""

    def __init__(self, text: Text, tokenizer: Any) -> None:
        from bpe import pieces

        self.vocabulary = tokenizer.get_vocab_size()
        self.num_bytes = torch.tensor([len(piece) for piece in pieces(tokenizer)])
        self.ids = torch.tensor(tokenizer.encode(text.data.decode("utf-8", "replace")).ids)

    @property
    def bytes_per_token(self) -> float:
        return float(self.num_bytes[self.ids].sum()) / len(self.ids)

    def rows(self, row_bytes: int, rows: int, seed: int) -> Tensor:
        """As many tokens as make ``row_bytes`` on average, behind a BOS each."""
        num_tokens = round(row_bytes / self.bytes_per_token)
        generator = torch.Generator().manual_seed(seed)
        begins = torch.randint(len(self.ids) - num_tokens, (rows,), generator=generator).tolist()
        return torch.stack([torch.cat([torch.tensor([BOS]), self.ids[begin : begin + num_tokens]]) for begin in begins])


class Tokens:
    """A token model that learns, of the FLOPs per byte that it is asked for."""

    def __init__(
        self, text: TokenText, like: TransformerConfig, flops_per_byte: float, row_bytes: int, mode: Mode
    ) -> None:
        self.text = text
        self.config = equal_flops_config(like, flops_per_byte, row_bytes, text.bytes_per_token, text.vocabulary)
        network = TokenTransformer(self.config, text.vocabulary)
        initialise(network, torch.Generator().manual_seed(0))
        self.trainer = Trainer(network, mode.training(row_bytes, 1), self._loss)

    def step(self, rows: Tensor) -> Step:
        seconds, _ = self.trainer.update(rows)
        return Step(int(self.text.num_bytes[rows[:, 1:]].sum()), seconds)

    @property
    def dtype(self) -> str:
        return self.trainer.dtype

    def flops(self, row_bytes: int) -> float:
        """Of a forward pass, per byte."""
        return token_model_flops_per_byte(self.config, row_bytes, self.text.bytes_per_token, self.text.vocabulary)

    def _loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return next_id_loss(self.trainer.network(inputs), targets), 0


def equal_flops_config(
    like: TransformerConfig, wanted: float, row_bytes: int, bytes_per_token: float, vocabulary: int
) -> TransformerConfig:
    """A transformer of this width whose forward pass, its head with it, costs ``wanted`` FLOPs per byte.

    As many layers as come nearest, then a feed-forward width, a multiple of 8, that makes up for the rest.
    """

    def cost(config: TransformerConfig) -> float:
        return token_model_flops_per_byte(config, row_bytes, bytes_per_token, vocabulary)

    sizes = [like.model_copy(update={"num_layers": layers}) for layers in range(1, 100)]
    nearest = min(sizes, key=lambda config: abs(cost(config) - wanted))
    widths = [nearest.model_copy(update={"ffn_width": width}) for width in range(8, 4 * like.ffn_width, 8)]
    found = min(widths, key=lambda config: abs(cost(config) - wanted))
    if abs(cost(found) / wanted - 1) > 0.02:
        raise ValueError(f"no token model of width {like.width} costs {wanted:.3g} FLOPs per byte")
    return found


def sized(name: str, table_rows: int | None = None) -> ModelConfig:
    """``25m``: of 25.5 million parameters, 11.5 lie in tables. ``110m`` and ``tiny`` as in decode.py, ``demo`` the preset
    with a transformer."""
    if name == "25m":
        local: dict[str, Any] = {"width": 192, "num_heads": 3, "window_positions": 512}
        config = ModelConfig(
            entropy_model=EntropyModelConfig(num_layers=2, **local),
            hash_embeddings=HashEmbeddingsConfig(table_rows=10_000),
            local_encoder=TransformerConfig(num_layers=1, **local),
            latent=TransformerConfig(num_layers=6, width=384, num_heads=6),
            local_decoder=TransformerConfig(num_layers=3, **local),
        )
    else:
        config = read_run_config("demo_transformer").model if name == "demo" else shape(name)
    tables = config.hash_embeddings if table_rows is None else HashEmbeddingsConfig(table_rows=table_rows)
    return config.model_copy(update={"hash_embeddings": tables, "max_bytes": LONGEST_ROW})


@torch.no_grad()
def random_models(config: ModelConfig) -> LanguageModel:
    """Both networks as training begins with them, but that the entropy model tells bytes apart."""
    assert config.entropy_model is not None
    entropy_model, network = EntropyModel(config.entropy_model), ByteLatentTransformer(config)
    for seed, module in enumerate((entropy_model, network)):
        initialise(module, torch.Generator().manual_seed(seed))
    entropy_model.byte_embedding.weight.normal_(generator=torch.Generator().manual_seed(2))
    patching = PatchingConfig(threshold_nats=1.0)  # until rows are there to find a better one
    return LanguageModel(config.model_copy(update={"patching": patching}), entropy_model.eval(), network)


def _weight_bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.state_dict().values())


def _kept_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    states: Sequence[dict[str, Any]] = list(optimizer.state.values())
    moments = sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
    return _weight_bytes(module) + moments

"""Tiny models with random weights, and rows of ids for them: nothing is trained, nothing is flat. And ways to disturb."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blt.byte_ids import BOS, EOS, VOCAB_SIZE
from blt.config import (
    EntropyModelConfig,
    HashEmbeddingsConfig,
    ModelConfig,
    NgramEntropyModelConfig,
    PatchingConfig,
    TransformerConfig,
)
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel
from blt.model.hash_embeddings import HashEmbeddings
from blt.model.ngram_entropy_model import NgramEntropyModel
from blt.model.transformer import initialise

SHAPE: dict[str, Any] = {"width": 16, "num_heads": 2, "ffn_width": 24}


def tiny_config(**changes: Any) -> ModelConfig:
    """Two slots of width 16 make patch states of the latent width 32, windows are much shorter than a row."""
    config = ModelConfig(
        entropy_model=EntropyModelConfig(num_layers=2, window_positions=6, **SHAPE),
        patching=PatchingConfig(threshold_nats=5.0),
        hash_embeddings=HashEmbeddingsConfig(ngram_bytes=(3, 4, 5), table_rows=50),
        local_encoder=TransformerConfig(num_layers=1, window_positions=9, **SHAPE),
        latent=TransformerConfig(num_layers=2, width=32, num_heads=4, ffn_width=40),
        local_decoder=TransformerConfig(num_layers=2, window_positions=9, **SHAPE),
        max_bytes=1024,
    )
    return ModelConfig.model_validate({**dict(config), **changes})


def random_models(config: ModelConfig, seed: int = 0) -> tuple[EntropyModel | NgramEntropyModel, ByteLatentTransformer]:
    """The config's entropy model and network; norms differ from 1 and embeddings are as large as what is added to them."""
    assert config.entropy_model is not None
    network = ByteLatentTransformer(config)
    randomise(network, seed + 1)
    return random_entropy_model(config.entropy_model, seed), network


def random_entropy_model(
    config: EntropyModelConfig | NgramEntropyModelConfig, seed: int
) -> EntropyModel | NgramEntropyModel:
    """Random weights, or tables of any entropies and confidences."""
    if config.kind == "transformer":
        model = EntropyModel(config)
        randomise(model, seed)
        return model
    tables, generator = NgramEntropyModel(config), torch.Generator().manual_seed(seed)
    tables.slots.random_(-(2**15), 2**15, generator=generator)
    tables.pair_doubts.random_(0, 5 * 2**19, generator=generator)  # nats
    return tables


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Weights drawn anew, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    initialise(module, generator)
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.weight.normal_(generator=generator)
        elif isinstance(part, HashEmbeddings) and part.config.min_count > 1:
            part.frequent.random_(generator=generator)
        elif isinstance(part, nn.RMSNorm):
            part.weight.uniform_(0.5, 1.5, generator=generator)


def random_row(num_ids: int, seed: int, eos_at: Sequence[int] = ()) -> Tensor:
    """One row of ids: BOS, then any ids but EOS, which stands at ``eos_at`` only; a BOS follows each EOS."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(0, VOCAB_SIZE - 1, (1, num_ids), generator=generator)
    row[row >= EOS] += 1
    row[0, 0] = BOS
    for position in eos_at:
        row[0, position] = EOS
        row[0, position + 1 : position + 2] = BOS
    return row


def threshold_between(entropies: Tensor) -> float:
    """A threshold that about half of the entropies exceed, as far from all of them as it can be there.

    Rounding in another order of sums cannot move an entropy across it.
    """
    ordered = entropies[~entropies.isnan()].double().sort().values
    middle = ordered[len(ordered) // 3 : 2 * len(ordered) // 3 + 2]
    gaps = middle.diff()
    widest = int(gaps.argmax())
    assert gaps[widest] > 1e-4
    return float((middle[widest] + middle[widest + 1]) / 2)


def stop_after(times: int) -> Callable[[], Any]:
    """Stands in for ``stop_after_this_step``: a Ctrl-C that arrives when it is asked for the nth time."""

    @contextmanager
    def stopping() -> Iterator[Callable[[], bool]]:
        asked = iter(range(times))
        yield lambda: next(asked, None) == times - 1

    return stopping


def change_entropy_model(run: Path) -> None:
    """Move one of its weights."""
    file = run / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.patcher.norm.weight"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})

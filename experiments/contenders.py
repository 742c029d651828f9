"""Who competes in the claims: Byte Latent Transformers by patching rule, flat bytes and tokens of a BPE, at equal FLOPs.

``run`` trains one on a text, in one pass over it, scores it on held-out texts, and keeps what it found in the run's folder;
a run that was cut goes on, one that is done is read.
"""

import json
import os
import platform
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from token_transformer import (
    TokenModel,
    equal_flops_config,
    ids_per_row,
    in_tokens,
    learned_bpe,
    load_token_model,
    num_ids,
    train_token_model,
    training_flops,
)

import blt
from blt.config import (
    EntropyModelConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    TransformerConfig,
)
from blt.config_file import read_run_config
from blt.corpus import BatchReader, ByteShard
from blt.documents import read_documents
from blt.evaluate import Score, score_documents, total_score
from blt.flops import entropy_model_flops, flops_per_byte, parameter_counts, token_model_flops_per_byte
from blt.language_model import LanguageModel
from blt.model.patching import mean_patch_bytes, patch_starts
from blt.progress import Reporter
from blt.train import open_corpus, train

HERE = Path(__file__).parent
CONFIG = HERE / "claims.toml"
CPU = torch.device("cpu")
ROW_BYTES = 512
TOKENS_OF_TABLES = (2, 3)  # of token n-grams: about as many bytes as those of a BLT have, 3 to 8


@dataclass(frozen=True)
class Contender:
    """A model to train. ``settings`` are those of ``blt train --set``; a token model reads of them [training]'s only,
    and those of its tables."""

    kind: str  # blt, bytes or bpe
    settings: Mapping[str, Any] = field(default_factory=dict)
    width: int = 0  # bytes and bpe: of the transformer, whose depth the FLOPs decide
    vocabulary: int = 0  # bpe
    tables: bool = False  # bpe: look-up tables of as many rows for n-grams of tokens as a BLT has for those of bytes

    def but(self, **changes: Any) -> "Contender":
        """The same with other settings (dots written as two underscores), width, vocabulary or tables."""
        own = {name: changes.pop(name) for name in ("width", "vocabulary", "tables") if name in changes}
        settings = {**self.settings, **{name.replace("__", "."): value for name, value in changes.items()}}
        return replace(self, settings=settings, **own)


REFERENCE_FLOPS = 329_112  # of one byte, forward: what contenders are sized to, the FLOPs of claims.toml
MUON = {"training.matrix_optimizer": "muon"}
LOCAL = {"num_layers": 1, "width": 48, "num_heads": 1, "ffn_width": 128, "window_positions": 64}
PAPER_BLT = Contender(
    "blt",
    {
        "model.local_encoder": LOCAL,
        "model.local_decoder": LOCAL,
        "training.learning_rate": 8e-3,
        "training.rows_per_step": 16,
    }
    | MUON,
)
SEEN_TWICE = {"model__hash_embeddings__min_count": 2}  # n-grams that training text has once share a row
BLT = PAPER_BLT.but(**SEEN_TWICE)
BPE_RATES = {"training.learning_rate": 18e-3, "training.table_learning_rate": 1e-1} | MUON
BYTES_RATES = {"training.learning_rate": 8e-3, "training.table_learning_rate": 2e-2} | MUON
SPACE = {"model__patching__rule": "space", "model__entropy_model": None}
FIXED_4 = {"model__patching__rule": "fixed", "model__patching__patch_bytes": 4, "model__entropy_model": None}
BPE = Contender("bpe", BPE_RATES, width=128, vocabulary=2048)
CONTENDERS = {  # as tuning.py found them; that n-grams seen once share a row came after it (docs/log.md)
    "BLT, entropy": BLT,
    "BLT, space": BLT.but(**SPACE),
    "BLT, fixed 4": BLT.but(**FIXED_4),
    "BLT, all n-grams": PAPER_BLT,
    "bytes": Contender("bytes", BYTES_RATES | {"training.rows_per_step": 4}, width=48),
    "BPE": BPE,
    "BPE with tables": BPE.but(tables=True, **SEEN_TWICE),
}

LARGE_FLOPS = 4 * REFERENCE_FLOPS  # for text that takes a core half an hour
LARGE_LOCAL = {"num_layers": 1, "width": 96, "num_heads": 1, "ffn_width": 96, "window_positions": 64}
LARGE_PAPER_BLT = PAPER_BLT.but(
    model__local_encoder=LARGE_LOCAL,
    model__local_decoder={**LARGE_LOCAL, "num_layers": 2, "window_positions": 512},  # who copies must see far
    model__slots_per_patch=2,
    model__latent__width=192,
    model__latent__num_heads=3,
    model__latent__ffn_width=528,
    model__hash_embeddings__table_rows=262_144,
    training__learning_rate=5e-3,
)
LARGE_BLT = LARGE_PAPER_BLT.but(**SEEN_TWICE)
WIDE_LOCAL = {**LARGE_LOCAL, "ffn_width": 264}
LARGE_BPE = Contender("bpe", BPE_RATES | {"training.learning_rate": 5e-3}, width=192, vocabulary=4096)
LARGE_CONTENDERS = {
    "BLT, entropy": LARGE_BLT,
    "BLT, fixed 4": LARGE_BLT.but(**FIXED_4),
    "BLT, all n-grams": LARGE_PAPER_BLT,
    "BLT, windows of 64": LARGE_PAPER_BLT.but(  # what 8 MB had chosen: one latent layer, and nothing that can copy
        model__local_encoder=WIDE_LOCAL,
        model__local_decoder={**WIDE_LOCAL, "num_layers": 2},
        model__slots_per_patch=4,
        model__latent__width=256,
        model__latent__num_heads=4,
        model__latent__ffn_width=704,
        training__learning_rate=8e-3,
    ),
    "BPE": LARGE_BPE,
    "BPE with tables": LARGE_BPE.but(tables=True, model__hash_embeddings__table_rows=262_144, **SEEN_TWICE),
}


def run(
    contender: Contender,
    text: Path,
    held_out: Mapping[str, Path],
    folder: Path,
    flops: float,
    seed: int = 0,
    dtype: str = "auto",
) -> dict[str, Any]:
    """What a contender makes of held-out texts after one pass over ``text``, at ``flops`` per byte of its forward pass.

    Ends the script where the folder holds a run of another dtype: figures of one table are of one.
    """
    result = folder / "result.json"
    if result.exists():
        figures: dict[str, Any] = json.loads(result.read_text())
        if dtype not in ("auto", figures["training"]["dtype"]):
            raise SystemExit(f"{folder} holds a run in {figures['training']['dtype']}; give another --work or --dtype")
        return figures
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"training.seed": seed, "training.dtype": dtype, "data.paths": [str(text)], **contender.settings}
    with Reporter() as reporter:
        config = read_run_config(CONFIG, [f"{name}={_toml(value)}" for name, value in settings.items()])
        shard, validation = open_corpus(config, folder, reporter)
        if contender.kind == "blt":
            figures = _run_blt(config, shard, folder, flops, reporter)
        else:
            figures = _run_tokens(contender, config, shard, validation, folder, flops, reporter)
    model = load(folder)
    scored = {name: total_score(scores(model, documents_of(path))) for name, path in held_out.items()}
    figures |= {
        "seed": seed,
        "train_bytes": shard.num_bytes,
        "train_flops": figures["train_flops_per_byte"] * shard.num_bytes,
        "bits_per_byte": {name: score.bits_per_byte for name, score in scored.items()},
        "unit_bytes": {name: score.mean_patch_bytes for name, score in scored.items()},
        "machine": machine(),
    }
    result.write_text(json.dumps(figures, indent=2) + "\n")
    for state in list(folder.glob("**/state")):  # what only a run that goes on needs, three times the size of its model
        shutil.rmtree(state)
    return figures


def load(folder: Path) -> LanguageModel | TokenModel:
    """The trained model of a run."""
    return blt.load(folder / "blt") if (folder / "blt").exists() else load_token_model(folder)


def scores(
    model: LanguageModel | TokenModel, documents: Sequence[bytes], prompts: Sequence[bytes] | None = None
) -> list[Score]:
    """Of each document, after a prompt that is not scored, in windows of as many bytes as rows of training have."""
    if isinstance(model, TokenModel):
        return model.scores(documents, prompts)
    before = prompts or [b""] * len(documents)
    texts = [prompt + document for prompt, document in zip(before, documents, strict=True)]
    prompt_bytes = [len(prompt) for prompt in before]
    return score_documents(model.predict, texts, ROW_BYTES, model.device, prompt_bytes=prompt_bytes)


def documents_of(path: Path) -> list[bytes]:
    return [document.data for document in read_documents([path])]


def sized(model: ModelConfig, patch_bytes: float, flops: float, row_bytes: int) -> ModelConfig:
    """The model with a latent transformer of as many layers as come nearest to ``flops`` per byte, and a feed-forward width,
    a multiple of 8, that makes up for the rest.
    """

    def with_latent(**changes: int) -> ModelConfig:
        return model.model_copy(update={"latent": model.latent.model_copy(update=changes)})

    def distance(config: ModelConfig) -> float:
        return abs(flops_per_byte(config, patch_bytes, row_bytes).inference / flops - 1)

    deep = min((with_latent(num_layers=layers) for layers in range(1, 60)), key=distance)
    layers = deep.latent.num_layers
    widths = range(8, 4 * model.latent.ffn_width, 8)
    found = min((with_latent(num_layers=layers, ffn_width=width) for width in widths), key=distance)
    if distance(found) > 0.01:
        raise ValueError(f"no latent transformer of width {model.latent.width} makes {flops:.3g} FLOPs per byte")
    return found


def _run_blt(config: RunConfig, shard: ByteShard, folder: Path, flops: float, reporter: Reporter) -> dict[str, Any]:
    patch_bytes, row_bytes = config.calibration.target_patch_bytes, config.training.row_bytes
    if not config.model.patching.uses_entropies:
        rows = BatchReader(shard, row_bytes, 400, seed=0).next_batch()[:, :-1]
        patch_bytes = mean_patch_bytes(rows, patch_starts(rows, None, config.model.patching))
    model = sized(config.model, patch_bytes, flops, row_bytes)
    training = config.training.model_copy(update={"total_bytes": shard.num_bytes})
    config = config.model_copy(update={"model": model, "training": training})
    before = 0.0  # the entropy model's own training, if it is a network, on the same bytes
    if config.entropy_training is not None:
        assert isinstance(model.entropy_model, EntropyModelConfig)
        entropy_training = config.entropy_training.model_copy(update={"total_bytes": shard.num_bytes})
        config = config.model_copy(update={"entropy_training": entropy_training})
        before = 3 * entropy_model_flops(model.entropy_model, row_bytes)
    lm = train(config, folder / "blt", CPU, (folder / "blt").exists(), reporter)
    reports = _reports(folder / "blt")
    measured = statistics.fmean(report["mean_patch_bytes"] for report in reports)
    counted = flops_per_byte(lm.config, measured, row_bytes)
    return {
        "train_flops_per_byte": counted.training + before,
        "inference_flops_per_byte": counted.inference,
        "parameters": parameter_counts(lm.config),
        "latent": lm.config.latent.model_dump(include={"num_layers", "width", "ffn_width"}),
        "train_unit_bytes": measured,
        "train_seconds": reports[-1]["train_seconds"],
        "training": lm_training(config.training),
    }


def _run_tokens(
    contender: Contender,
    config: RunConfig,
    shard: ByteShard,
    validation: ByteShard,
    folder: Path,
    flops: float,
    reporter: Reporter,
) -> dict[str, Any]:
    tokenizer, units, bytes_per_id, row_bytes = None, shard, 1.0, config.training.row_bytes
    if contender.kind == "bpe":
        texts = (document.data.decode("utf-8", "replace") for document in shard.documents())
        tokenizer = learned_bpe(texts, contender.vocabulary, folder / "tokenizer.json")
        units = in_tokens(shard, tokenizer)
        bytes_per_id = shard.num_bytes / units.num_bytes
    like = TransformerConfig(num_layers=1, width=contender.width, num_heads=max(1, contender.width // 64))
    shape = equal_flops_config(like, flops, row_bytes, bytes_per_id, num_ids(tokenizer))
    ids = ids_per_row(row_bytes, bytes_per_id)
    training = config.training.model_copy(update={"total_bytes": units.num_bytes, "row_bytes": ids})
    held_out = [document.data for document in validation.documents()]
    tables = config.model.hash_embeddings.model_copy(update={"ngram_bytes": TOKENS_OF_TABLES})
    tables_or_none = tables if contender.tables else None
    model = train_token_model(folder, units, held_out, shape, tokenizer, training, reporter, tables_or_none)
    return {
        "train_flops_per_byte": training_flops(model, row_bytes, bytes_per_id),
        "inference_flops_per_byte": token_model_flops_per_byte(shape, row_bytes, bytes_per_id, model.num_ids),
        "parameters": {"total": model.parameters},
        "latent": shape.model_dump(include={"num_layers", "width", "ffn_width"}),
        "train_unit_bytes": bytes_per_id,
        "train_seconds": _reports(folder)[-1]["train_seconds"],
        "training": lm_training(training),
    }


def lm_training(training: TrainingConfig) -> dict[str, Any]:
    """What of the training's settings was tuned."""
    names = {
        "row_bytes",
        "rows_per_step",
        "learning_rate",
        "table_learning_rate",
        "warmup_steps",
        "dtype",
        "matrix_optimizer",
    }
    return training.model_dump(include=names)


def _reports(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == "network" and "train_seconds" in line]


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {_toml(of)}" for name, of in value.items()) + "}"
    return "none" if value is None else json.dumps(value)


def machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} CPU cores, {platform.machine()} with {capability}, torch {torch.__version__}"

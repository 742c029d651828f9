"""One training loop for every network: rows in, updates out, reports on the way, state that resumes exactly."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blt import corpus
from blt.byte_ids import BOS
from blt.checkpoint import load_state, naming_the_place, save_state, saved_steps, write_whole
from blt.config import TrainingConfig
from blt.model.hash_embeddings import HashEmbeddings
from blt.model.latent_transformer import LatentTransformer
from blt.model.transformer import Transformer
from blt.muon import Muon
from blt.processor import keep_freed_memory, multiply_fast_in_fp32, product_flops_per_second
from blt.progress import Reporter
from blt.row_adamw import RowAdamW, clip_gradients
from blt.shapes import ByteIds, Entropies, EntropyLogits


class Loss(NamedTuple):
    """What a network makes of some rows, summed over their targets."""

    objective: Tensor  # what training minimises, nats
    nats: Tensor  # of the true targets, which is reported; the objective itself, unless a teacher sets another
    patches: int


@dataclass(frozen=True)
class Job:
    """One network to optimise: what the loop needs to know of it."""

    name: str
    model: nn.Module
    config: TrainingConfig
    state_folder: Path
    # of inputs and their targets (BOE and BOS are none), and the inputs' entropies where a sidecar has them
    loss: Callable[[ByteIds, ByteIds, Entropies | None], Loss]
    evaluate: Callable[[], dict[str, Any]]  # held-out figures for metrics.jsonl
    save_model: Callable[[], None]
    flops_per_byte: Callable[[float], float]  # mean patch bytes -> training FLOPs
    entropies_of_rows: Callable[[Sequence[int]], Entropies] | None = None  # read from a sidecar; None: nothing is read


@dataclass
class ReportWindow:
    """Sums over the steps since the last report, and the FLOPs since the first; part of the training state."""

    nats: float = 0.0
    targets: int = 0
    bytes: int = 0
    patches: int = 0
    seconds: float = 0.0  # spent in training steps
    flops: float = 0.0
    total_seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def close(self, flops_per_byte: Callable[[float], float]) -> dict[str, float]:
        """The figures of these steps; the next window starts here. ``train_bits_per_byte`` counts EOS as a byte."""
        mean_patch = self.bytes / self.patches if self.patches else math.nan
        self.flops += flops_per_byte(mean_patch) * self.bytes
        self.total_seconds += self.seconds
        figures = {
            "train_bits_per_byte": self.nats / self.targets / math.log(2),
            "bytes_per_second": self.bytes / self.seconds,
            "flops_per_second": flops_per_byte(mean_patch) * self.bytes / self.seconds,
            "train_seconds": self.total_seconds,
            "train_flops": self.flops,
        }
        if self.patches:
            figures["mean_patch_bytes"] = mean_patch
        self.nats, self.targets, self.bytes, self.patches, self.seconds = 0.0, 0, 0, 0, 0.0
        return figures


class Metrics:
    """metrics.jsonl: one object per report or evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, report: dict[str, Any]) -> None:
        with naming_the_place(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All reports; a last line that a dying process cut is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text("utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def forget_after(self, phase: str, step: int) -> None:
        """Drop what a run that died reported after the state it goes on from."""
        reports = self.read()
        kept = [report for report in reports if report["phase"] != phase or report["step"] <= step]
        if self.path.exists():
            write_whole(self.path, "".join(json.dumps(report) + "\n" for report in kept))


def optimise(
    job: Job,
    shard: corpus.ByteShard,
    metrics: Metrics,
    reporter: Reporter,
    stop_requested: Callable[[], bool],
) -> None:
    """The training loop: goes on from the newest state in the job's folder, on a CPU to the bit."""
    config, device = job.config, next(job.model.parameters()).device
    prepare(job.model, config)
    optimizer = build_optimizer(job.model, config)
    peak_flops = product_flops_per_second(_product_dtype(config), device)
    reader = corpus.BatchReader(shard, config.row_bytes, config.rows_per_step, config.seed)
    step, window = 0, ReportWindow()
    if saved_steps(job.state_folder):
        step, position = load_state(job.state_folder, job.model, optimizer, reader.state() | window.state())
        reader.restore(position)
        window = ReportWindow(**{name: position[name] for name in window.state()})
    metrics.forget_after(job.name, step)
    job.model.train()
    while step < config.total_steps:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, config)
        row_indices = reader.next_row_indices()
        inputs = corpus.rows_of(shard, row_indices, config.row_bytes)[:, :-1].to(device)
        targets = corpus.targets_of(shard, row_indices, config.row_bytes).to(device)
        entropies = job.entropies_of_rows(row_indices).to(device) if job.entropies_of_rows else None
        norm = train_step(job, optimizer, inputs, targets, entropies, window)
        step += 1
        if not math.isfinite(norm):
            raise ValueError(
                f"{job.name}: the gradient became {norm} at step {step}; start anew with a lower learning_rate"
            )
        last, stopping = step == config.total_steps, stop_requested()
        position = {"phase": job.name, "step": step, "bytes_seen": step * config.bytes_per_step}
        if step % config.steps_per_report == 0 or last:
            figures = window.close(job.flops_per_byte)
            figures["flops_utilisation"] = figures["flops_per_second"] / peak_flops
            learning_rate = optimizer.param_groups[0]["lr"]
            metrics.write(position | figures | {"learning_rate": learning_rate, "gradient_norm": norm})
            reporter.show(job.name, step, config.total_steps, figures_line(position | figures))
        if step % config.steps_per_evaluation == 0 or last:
            held_out = job.evaluate()
            metrics.write(position | held_out)
            reporter.say(f"{job.name}: {held_out['valid_bits_per_byte']:.4f} bits per held-out byte at step {step}")
            job.model.train()
        if step % config.steps_per_save == 0 or last or stopping:
            job.save_model()
            save_state(job.state_folder, step, job.model, optimizer, reader.state() | window.state())
        if stopping and not last:
            reporter.say(f"stopped after step {step} of the {job.name}; everything is saved, go on with --resume")
            raise KeyboardInterrupt
    job.model.eval()


def prepare(model: nn.Module, config: TrainingConfig) -> None:
    """Set up what depends on how a network is trained: its tables' numbers, what its layers keep, the process's memory."""
    keep_freed_memory()
    multiply_fast_in_fp32()
    for part in model.modules():
        if isinstance(part, HashEmbeddings):
            part.to(torch.bfloat16 if config.table_dtype == "bfloat16" else torch.float32)
        elif isinstance(part, Transformer):
            part.recompute = config.recompute_activations


def train_step(
    job: Job,
    optimizer: torch.optim.Optimizer,
    inputs: ByteIds,
    targets: ByteIds,
    entropies: Entropies | None,
    window: ReportWindow,
) -> float:
    """One update from some rows; the gradient's norm before clipping."""
    started = time.perf_counter()
    num_targets = max(1, int((targets > BOS).sum()))  # rows of one long prompt have none
    dtype = _product_dtype(job.config)
    autocast = torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32)
    parts = job.config.micro_batches
    entropies_of_parts = [None] * parts if entropies is None else entropies.chunk(parts)
    for part, next_ids, of_part in zip(inputs.chunk(parts), targets.chunk(parts), entropies_of_parts, strict=True):
        with autocast:
            loss = job.loss(part, next_ids, of_part)
        (loss.objective / num_targets).backward()
        window.nats += float(loss.nats.detach())
        window.patches += loss.patches
    norm = clip_gradients(job.model.parameters(), job.config.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    window.targets += num_targets
    window.bytes += targets.numel()
    window.seconds += time.perf_counter() - started
    return norm


def _product_dtype(config: TrainingConfig) -> torch.dtype:
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def figures_line(report: dict[str, Any]) -> str:
    """One report as a person reads it."""
    patches = f"  patches {report['mean_patch_bytes']:.2f} B" if "mean_patch_bytes" in report else ""
    return (
        f"{report['bytes_seen'] / 1e6:.2f} MB  {report['train_bits_per_byte']:.3f} bits/byte"
        f"{patches}  {report['bytes_per_second'] / 1e3:.1f} kB/s  {report['flops_utilisation']:.0%} of peak FLOPs"
    )


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """The share of the peak learning rate that step ``step`` (from 0) uses.

    >>> config = TrainingConfig(total_bytes=8, row_bytes=4, rows_per_step=1, warmup_steps=1)
    >>> [learning_rate_factor(step, config.model_copy(update={"total_bytes": 20})) for step in (0, 1, 3)]
    [1.0, 1.0, 0.5]
    """
    warmup, total = min(config.warmup_steps, config.total_steps), config.total_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    decay_steps = max(1, round(config.decay_fraction * total))
    return min(1.0, (total - step) / decay_steps)


def build_optimizer(model: nn.Module, config: TrainingConfig) -> RowAdamW:
    """AdamW, or Muon for matrices, over what is not frozen. Matrices decay, norms and embedding tables do not; hash tables go
    row by row and may have their own rate, as latent layers may. A head's matrix is AdamW's: its rows are bytes, not states.
    """
    rate, table_rate = config.learning_rate, config.table_learning_rate or config.learning_rate
    orthogonal = config.matrix_optimizer == "muon"
    kind = {id(part.weight): "matrix" for part in model.modules() if isinstance(part, nn.Linear)}
    kind |= {id(part.weight): "embedding" for part in model.modules() if isinstance(part, nn.Embedding)}
    kind |= {id(part.tables.weight): "table" for part in model.modules() if isinstance(part, HashEmbeddings)}
    if orthogonal:
        kind |= {id(weight): "head" for name, weight in model.named_parameters() if name.endswith("head.weight")}
    latent = {
        id(weight)
        for part in model.modules()
        if isinstance(part, LatentTransformer) and config.latent_learning_rate_factor != 1
        for weight in part.transformer.parameters()
    }

    def group(of_kind: str, peak_lr: float, in_latent: bool = False, **options: Any) -> dict[str, Any]:
        chosen = [
            weight
            for weight in model.parameters()
            if weight.requires_grad and kind.get(id(weight), "norm") == of_kind and (id(weight) in latent) == in_latent
        ]
        return {"params": chosen, "peak_lr": peak_lr, **options}

    latent_rate, decay = rate * config.latent_learning_rate_factor, config.weight_decay
    muon = {"orthogonal": True} if orthogonal else {}
    groups = [
        group("matrix", rate, weight_decay=decay, **muon),
        group("head", rate, weight_decay=decay),
        group("embedding", table_rate),
        group("table", table_rate, by_row=True),
        group("norm", rate),
        group("matrix", latent_rate, in_latent=True, weight_decay=decay, **muon),
        group("norm", latent_rate, in_latent=True),
    ]
    groups = [group for group in groups if group["params"]]  # an entropy model has no tables
    settings: dict[str, Any] = {"lr": rate, "betas": config.betas, "eps": config.adam_eps, "weight_decay": 0.0}
    if orthogonal:
        return Muon(groups, _product_dtype(config), fused=True, **settings)
    return RowAdamW(groups, fused=True, **settings)


def next_id_loss(logits: Tensor, targets: ByteIds) -> Tensor:
    """Summed nats over bytes and EOS; padding and the BOS that follows an EOS are nobody's business."""
    targets = targets.masked_fill(targets <= BOS, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")


def distillation_loss(logits: EntropyLogits, teacher_logits: EntropyLogits, targets: ByteIds) -> Tensor:
    """Summed cross-entropy (nats) with a teacher's predictions where ``next_id_loss`` has targets: their KL divergence and
    the teacher's own entropies, which no student changes.
    """
    is_target = targets > BOS
    probabilities = teacher_logits[is_target].float().softmax(-1)
    return F.cross_entropy(logits[is_target].float(), probabilities, reduction="sum")


@contextmanager
def stop_after_this_step() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM ask to stop after the step in progress; a second Ctrl-C stops at once."""
    requested = False

    def request(signal_number: int, frame: object) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Text -> a trained model: entropy model, threshold, network, in one run folder, by one loop for both networks."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blt import corpus
from blt.byte_ids import BOS
from blt.checkpoint import load_state, save_state, saved_steps, write_whole
from blt.config import ModelConfig, RunConfig, TrainingConfig, read_run_config, to_toml
from blt.evaluate import score_documents, total_score
from blt.flops import flops_per_byte
from blt.huggingface import load_model
from blt.language_model import LanguageModel, load
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel
from blt.model.patching import mean_patch_bytes, patch_starts, threshold_for_patch_size
from blt.model.transformer import initialise
from blt.progress import Reporter
from blt.shapes import ByteIds, PatchStarts

ENTROPY_MODEL, NETWORK = "entropy model", "network"
SAMPLE_BYTES = 120


@dataclass(frozen=True)
class Job:
    """One network to optimise: what the loop needs to know of it."""

    name: str
    model: nn.Module
    config: TrainingConfig
    state_folder: Path
    loss: Callable[[ByteIds], tuple[Tensor, int]]  # rows -> summed nats over their targets, patches
    evaluate: Callable[[], dict[str, Any]]  # held-out figures for metrics.jsonl
    save_model: Callable[[], None]
    flops_per_byte: Callable[[float], float]  # mean patch bytes -> training FLOPs


def train(config: RunConfig, run: Path, device: torch.device, resume: bool, reporter: Reporter) -> LanguageModel:
    """Train what ``config`` describes into the folder ``run``, or go on with what is there.

    Raises FileExistsError for a folder that holds a run already, ValueError where ``resume`` meets another config,
    KeyboardInterrupt, once the state is saved, after Ctrl-C or SIGTERM.
    """
    config = _claim_folder(config, run, device, resume)
    train_shard, held_out = open_corpus(config, run, reporter)
    metrics = Metrics(run / "metrics.jsonl")
    with stop_after_this_step() as stop_requested:

        def optimise_job(job: Job) -> None:
            optimise(job, train_shard, metrics, reporter, stop_requested)

        network_state = run / "state" / "network"
        if saved_steps(network_state):
            lm = LanguageModel(*load_model(run / "model", torch.float32)).to(device)
        else:
            entropy_model = _entropy_model(config, run, device, held_out, optimise_job)
            model_config = _calibrated(config, entropy_model, train_shard, held_out, metrics, reporter)
            network = ByteLatentTransformer(model_config)
            initialise(network, torch.Generator().manual_seed(config.training.seed))
            lm = LanguageModel(model_config, entropy_model, network.to(device))
        optimise_job(_network_job(lm, config.training, run, held_out))
    return lm


def optimise(
    job: Job,
    shard: corpus.ByteShard,
    metrics: "Metrics",
    reporter: Reporter,
    stop_requested: Callable[[], bool],
) -> None:
    """The training loop: resumes from the newest state in the job's folder, and continues to the bit."""
    config, device = job.config, next(job.model.parameters()).device
    optimizer = build_optimizer(job.model, config)
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
        norm = train_step(job, optimizer, reader.next_batch().to(device), window)
        step += 1
        last, stopping = step == config.total_steps, stop_requested()
        position = {"phase": job.name, "step": step, "bytes_seen": step * config.bytes_per_step}
        if step % config.steps_per_report == 0 or last:
            if not math.isfinite(norm):
                raise ValueError(
                    f"the {job.name}'s gradient became {norm} at step {step}; start again with a lower learning_rate"
                )
            figures = window.close(job.flops_per_byte)
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


def train_step(job: Job, optimizer: torch.optim.Optimizer, rows: ByteIds, window: "ReportWindow") -> float:
    """One update from rows of ``row_bytes + 1`` ids; the gradient's norm before clipping."""
    started = time.perf_counter()
    num_targets = int((rows[:, 1:] > BOS).sum())
    autocast = torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=job.config.dtype == "bfloat16")
    for part in rows.chunk(job.config.micro_batches):
        with autocast:
            nats, patches = job.loss(part)
        (nats / num_targets).backward()
        window.nats += float(nats.detach())
        window.patches += patches
    norm = nn.utils.clip_grad_norm_(job.model.parameters(), job.config.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    window.targets += num_targets
    window.bytes += rows[:, 1:].numel()
    window.seconds += time.perf_counter() - started
    return float(norm)


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
            "train_seconds": self.total_seconds,
            "train_flops": self.flops,
        }
        if self.patches:
            figures["mean_patch_bytes"] = mean_patch
        self.nats, self.targets, self.bytes, self.patches, self.seconds = 0.0, 0, 0, 0, 0.0
        return figures


def figures_line(report: dict[str, Any]) -> str:
    """One report as a person reads it."""
    patches = f"  patches {report['mean_patch_bytes']:.2f} B" if "mean_patch_bytes" in report else ""
    return (
        f"{report['bytes_seen'] / 1e6:.2f} MB  {report['train_bits_per_byte']:.3f} bits/byte"
        f"{patches}  {report['bytes_per_second'] / 1e3:.1f} kB/s"
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


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, norms and embedding tables do not, and tables may have their own rate."""
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    matrices = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear)}
    rate, table_rate = config.learning_rate, config.table_learning_rate or config.learning_rate
    everything = list(model.parameters())
    groups = [
        {"params": [p for p in everything if id(p) in matrices], "peak_lr": rate, "weight_decay": config.weight_decay},
        {"params": [p for p in everything if id(p) in tables], "peak_lr": table_rate, "weight_decay": 0.0},
        {"params": [p for p in everything if id(p) not in matrices | tables], "peak_lr": rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=config.betas, eps=config.adam_eps, fused=True)


def next_id_loss(logits: Tensor, targets: ByteIds) -> Tensor:
    """Summed nats over bytes and EOS; padding and the BOS that follows an EOS are nobody's business."""
    targets = targets.masked_fill(targets <= BOS, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")


def open_corpus(config: RunConfig, run: Path, reporter: Reporter) -> tuple[corpus.ByteShard, corpus.ByteShard]:
    """The run's training and held-out shards, built at the first start."""
    folder = run / "corpus"
    if not folder.exists():
        documents = corpus.read_documents(config.data.paths, raw=config.data.raw)
        summary = corpus.build_shards(documents, folder, config.data.held_out_fraction)
        skipped = f"; {summary.empty_skipped} empty documents skipped" if summary.empty_skipped else ""
        reporter.say(
            f"corpus: {summary.documents['train']:,} documents, {summary.bytes['train'] / 1e6:.2f} MB to train on; "
            f"{summary.documents['held_out']:,}, {summary.bytes['held_out'] / 1e6:.2f} MB held out{skipped}"
        )
    return corpus.open_shard(folder, "train"), corpus.open_shard(folder, "held_out")


class Metrics:
    """metrics.jsonl: one object per report or evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, report: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
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


def resolve_dtype(config: TrainingConfig, device: torch.device) -> TrainingConfig:
    """``auto`` becomes what is faster here, measured: bf16 matrix products beat fp32 on some CPUs and lose on others."""
    if config.dtype != "auto":
        return config
    faster = "bfloat16" if device.type == "cuda" else "float32"
    if device.type == "cpu":
        seconds = {dtype: _seconds_per_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
        # autocast adds casts, so bf16 has to win by a margin
        faster = "bfloat16" if 1.5 * seconds[torch.bfloat16] < seconds[torch.float32] else "float32"
    return config.model_copy(update={"dtype": faster})


def _seconds_per_product(dtype: torch.dtype) -> float:
    left, right = torch.randn(2048, 256).to(dtype), torch.randn(768, 256).to(dtype)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        F.linear(left, right)
        times.append(time.perf_counter() - started)
    return min(times)


def _claim_folder(config: RunConfig, run: Path, device: torch.device, resume: bool) -> RunConfig:
    """Write the resolved config into a new run folder, or take the one of the run that goes on."""
    config_file = run / "config.toml"
    if config_file.exists() and not resume:
        raise FileExistsError(f"{run} holds a run already; go on with it (--resume) or give another folder (--out)")
    updates: dict[str, Any] = {"training": resolve_dtype(config.training, device)}
    if config.entropy_training is not None:
        updates["entropy_training"] = resolve_dtype(config.entropy_training, device)
    if not config_file.exists():
        run.mkdir(parents=True, exist_ok=True)
        config = config.model_copy(update=updates)
        write_whole(config_file, to_toml(config))
        return config
    started_with = read_run_config(config_file)
    if _without_dtypes(started_with) != _without_dtypes(config):
        raise ValueError(
            f"{run} was started with another config than this one; go on with its own: blt train {config_file} "
            f"--out {run} --resume"
        )
    return started_with


def _without_dtypes(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(exclude={"training": {"dtype"}, "entropy_training": {"dtype"}})


def _entropy_model(
    config: RunConfig,
    run: Path,
    device: torch.device,
    held_out: corpus.ByteShard,
    optimise_job: Callable[[Job], None],
) -> EntropyModel | None:
    """The entropy model of this run: trained here, or taken from the model that the config names."""
    if config.model.entropy_model is None:
        return None
    if config.pretrained_entropy_model is not None:
        found = load(config.pretrained_entropy_model, device=str(device)).entropy_model
        if found is None or found.config != config.model.entropy_model:
            raise ValueError(
                f"{config.pretrained_entropy_model} has another entropy model than [model.entropy_model] describes: "
                f"{found.config if found else 'none'}"
            )
        return found
    assert config.entropy_training is not None
    entropy_model = EntropyModel(config.model.entropy_model)
    initialise(entropy_model, torch.Generator().manual_seed(config.entropy_training.seed))
    entropy_model.to(device)
    optimise_job(_entropy_job(entropy_model, config, run, held_out))
    return entropy_model


def _entropy_job(entropy_model: EntropyModel, config: RunConfig, run: Path, held_out: corpus.ByteShard) -> Job:
    training = config.entropy_training
    assert training is not None
    documents = held_out.sample(training.evaluation_bytes, seed=0)
    device = next(entropy_model.parameters()).device

    def loss(rows: ByteIds) -> tuple[Tensor, int]:
        return next_id_loss(entropy_model(rows[:, :-1]), rows[:, 1:]), 0

    def predict(ids: ByteIds) -> tuple[Tensor, None, PatchStarts]:
        return entropy_model(ids), None, torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.bool, device=device)

    def evaluate() -> dict[str, Any]:
        total = total_score(score_documents(predict, documents, training.row_bytes, device))
        return {"valid_bits_per_byte": total.bits_per_byte}

    flops = 3 * flops_per_byte(config.model, 4.0, training.row_bytes).entropy_model
    state = run / "state" / "entropy_model"
    return Job(ENTROPY_MODEL, entropy_model, training, state, loss, evaluate, lambda: None, lambda mean_patch: flops)


def _network_job(lm: LanguageModel, training: TrainingConfig, run: Path, held_out: corpus.ByteShard) -> Job:
    documents = held_out.sample(training.evaluation_bytes, seed=0)

    def loss(rows: ByteIds) -> tuple[Tensor, int]:
        inputs = rows[:, :-1]
        starts = lm.patch_starts(inputs)
        return next_id_loss(lm.network(inputs, starts), rows[:, 1:]), int(starts[:, :-1].sum())

    def evaluate() -> dict[str, Any]:
        lm.network.eval()
        total = total_score(score_documents(lm.predict, documents, training.row_bytes, lm.device))
        prompt = documents[0][:64]
        sample = prompt + b"".join(lm.stream(prompt, SAMPLE_BYTES, temperature=0.8))
        figures = {f"valid_{name}": value for name, value in total.as_json().items()}
        return figures | {"sample": sample.decode("utf-8", "replace")}

    def flops(mean_patch: float) -> float:
        return flops_per_byte(lm.config, mean_patch, training.row_bytes).training

    state = run / "state" / "network"
    return Job(NETWORK, lm.network, training, state, loss, evaluate, lambda: lm.save(run / "model"), flops)


def _calibrated(
    config: RunConfig,
    entropy_model: EntropyModel | None,
    train_shard: corpus.ByteShard,
    held_out: corpus.ByteShard,
    metrics: "Metrics",
    reporter: Reporter,
) -> ModelConfig:
    """The model config with its threshold: the config's own, or the one that gives the target mean patch size."""
    patching = config.model.patching
    if not patching.uses_entropies or patching.threshold_nats is not None:
        return config.model
    assert entropy_model is not None
    device = next(entropy_model.parameters()).device
    row_bytes, target = config.training.row_bytes, config.calibration.target_patch_bytes

    def rows_with_entropies(shard: corpus.ByteShard) -> tuple[ByteIds, Tensor]:
        reader = corpus.BatchReader(shard, row_bytes, 16, seed=0)
        num_batches = -(-min(config.calibration.sample_bytes, shard.num_bytes) // (16 * row_bytes))
        batches = [reader.next_batch()[:, :-1].to(device) for _ in range(num_batches)]
        return torch.cat(batches), torch.cat([entropy_model.entropies(rows) for rows in batches])

    rows, entropies = rows_with_entropies(train_shard)
    threshold = threshold_for_patch_size(entropies, rows, patching, target)
    patching = patching.model_copy(update={"threshold_nats": threshold})
    reached = mean_patch_bytes(rows, patch_starts(rows, entropies, patching))
    rows, entropies = rows_with_entropies(held_out)
    reached_held_out = mean_patch_bytes(rows, patch_starts(rows, entropies, patching))
    report = {"threshold_nats": threshold, "target_patch_bytes": target, "train_patch_bytes": reached}
    metrics.forget_after("calibration", -1)
    metrics.write({"phase": "calibration", "step": 0} | report | {"valid_patch_bytes": reached_held_out})
    reporter.say(
        f"threshold {threshold:.4f} nats: patches of {reached:.2f} bytes on training text (asked: {target}), "
        f"{reached_held_out:.2f} on held-out text"
    )
    return config.model.model_copy(update={"patching": patching})

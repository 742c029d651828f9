"""Text -> a trained model: entropy model, threshold, network, in one run folder."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blt import __version__, corpus
from blt.byte_ids import BYTE_OFFSET
from blt.checkpoint import naming_the_place, saved_steps, write_whole
from blt.config import EntropyModelConfig, ModelConfig, NgramEntropyModelConfig, RunConfig, TrainingConfig
from blt.config_file import read_run_config, to_toml
from blt.documents import Document, read_documents
from blt.entropy_cache import EntropyCache
from blt.evaluate import Predictor, Score, evaluate_inputs, score_documents, total_score
from blt.flops import entropy_model_flops, flops_per_byte
from blt.language_model import LanguageModel, model_folder
from blt.lora import add_adapters, merged
from blt.model.entropy_model import EntropyModel
from blt.model.hash_embeddings import FrequentNgrams, HashEmbeddings
from blt.model.ngram_entropy_model import EXACT_ORDER, NgramCounts, NgramEntropyModel
from blt.model.patching import mean_patch_bytes, patch_starts, threshold_for_patch_size
from blt.model.transformer import initialise
from blt.model_card import read_card, with_figures
from blt.model_files import load_model, write_card
from blt.optimise import (
    Job,
    Loss,
    Metrics,
    distillation_loss,
    next_id_loss,
    optimise,
    stop_after_this_step,
)
from blt.processor import multiply_fast_in_fp32, product_flops_per_second
from blt.progress import Reporter
from blt.report import can_draw, patched_text, write_report
from blt.shapes import ByteIds, Entropies, PatchStarts
from blt.starting_points import (
    check_beginning,
    entropy_teacher,
    first_card,
    first_network,
    model_name,
    pretrained_entropy_model,
    scored_entropies,
    token_lesson,
)
from blt.token_teacher import Lesson

ENTROPY_MODEL, HASH_TABLES, NETWORK = "entropy model", "hash tables", "network"
SAMPLE_BYTES = 120
REPORT_BYTES = 1_000_000  # of held-out text, scored at the end of training
BFLOAT16_GAIN = 1.5  # of matrix products, from which on a training step gains in spite of the casts
COUNTED_BYTES = 1 << 20  # of training text at a time, for n-gram statistics


def train(config: RunConfig, run: Path, device: torch.device, resume: bool, reporter: Reporter) -> LanguageModel:
    """Train what ``config`` describes into the folder ``run``, or go on with what is there.

    Raises FileExistsError for a folder that holds a run already, ValueError where ``resume`` meets another config, or the model
    to go on from has another network, KeyboardInterrupt, once the state is saved, after Ctrl-C or SIGTERM.
    """
    goes_on = resume and bool(saved_steps(run / "state" / "network"))  # then all that it began from is in the run
    if not goes_on:
        check_beginning(config)
    lesson, teacher = token_lesson(config, device), None if goes_on else entropy_teacher(config, device)
    pretrained = pretrained_entropy_model(config, device) if not goes_on or config.data.entropies else None
    scored = scored_entropies(config, pretrained)
    is_new = not (run / "config.toml").exists()
    config = _claim_folder(config, run, device, resume)
    try:
        train_shard, held_out = open_corpus(config, run, reporter)
        if cut := corpus.num_cut_pairs(train_shard, config.training.row_bytes):
            reporter.say(
                f"{cut} of {train_shard.num_documents} documents are longer than training.row_bytes "
                f"{config.training.row_bytes}: what a row has no room for is learned without its prompt; raise row_bytes"
            )
        if scored is not None:
            scored.check_corpus(train_shard, str(config.entropy_model_source), config.data)
    except (ValueError, OSError):
        if is_new:  # text that cannot be read, or that nobody scored, leaves the folder free for better text
            (run / "config.toml").unlink()
            for built in ("corpus", "corpus.partial"):
                shutil.rmtree(run / built, ignore_errors=True)
            if not any(run.iterdir()):
                run.rmdir()
        raise
    metrics = Metrics(run / "metrics.jsonl")
    with stop_after_this_step() as stop_requested:

        def optimise_job(job: Job) -> None:
            optimise(job, train_shard, metrics, reporter, stop_requested)

        network_state = run / "state" / "network"
        if saved_steps(network_state):
            lm = LanguageModel(*load_model(run / "model", torch.float32), read_card(run / "model")).to(device)
        else:
            entropy_model = pretrained
            if entropy_model is None and isinstance(config.model.entropy_model, NgramEntropyModelConfig):
                entropy_model = fit_ngrams(config.model.entropy_model, train_shard, metrics, reporter).to(device)
            elif entropy_model is None and config.model.entropy_model is not None:
                entropy_model = _trained_entropy_model(config, run, device, held_out, teacher, optimise_job)
            model_config = _calibrated(config, entropy_model, device, train_shard, held_out, scored, metrics, reporter)
            network = first_network(config, model_config)
            tables = network.local_encoder.hash_embeddings
            if tables.config.min_count > 1 and not tables.frequent.any():  # a model that is only begun has none either
                fit_filter(tables, train_shard, config.training.row_bytes, reporter)
            lm = LanguageModel(model_config, entropy_model, network.to(device), first_card(config))
        if config.lora is not None:
            add_adapters(lm.network, config.lora, config.training.seed)
        optimise_job(_network_job(lm, config, run, held_out, scored, lesson))
    return LanguageModel(lm.config, lm.entropy_model, merged(lm.network), lm.card)


def train_and_report(
    config: RunConfig, run: Path, device: torch.device, resume: bool, reporter: Reporter
) -> tuple[LanguageModel, dict[str, Any]]:
    """Train, score held-out text, and leave evaluation.json and report.html in the run folder."""
    lm = train(config, run, device, resume, reporter)
    documents = corpus.open_shard(run / "corpus", "held_out").sample(REPORT_BYTES, seed=0)
    shown = documents[0].data[: min(300, lm.config.max_bytes - 1)]
    row_bytes = config.training.row_bytes
    evaluation = evaluate_inputs(lm.predict, {"held out": documents}, row_bytes, lm.device, reporter)
    write_whole(run / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    lm.card = with_figures(lm.card, evaluation, _how_it_was_trained(config, device))
    write_card(run / "model", lm.config, lm.card)
    if can_draw():
        write_report(run, patched_text(lm, shown), evaluation)
    else:
        reporter.say("no report.html: it needs matplotlib, pip install 'blt-lm[plot]'")
    return lm, evaluation


def _how_it_was_trained(config: RunConfig, device: torch.device) -> str:
    """What the model's card says after "Trained"; of paths only their last part, as folders may tell more than they should."""
    names, taken = ", ".join(Path(path).name for path in config.data.paths), config.pretrained_entropy_model
    entropy_model = ""
    if taken is not None:
        try:
            licence = read_card(model_folder(taken)).license_line or "none given"
        except OSError:  # moved since this run read it, or a hub out of reach
            licence = "could not be read again"
        name = model_name(taken)
        entropy_model = f", with the entropy model of {name} (its licence: {licence})"
    return (
        f"on {config.training.total_bytes / 1e6:.2f} MB of text ({names}) in rows of {config.training.row_bytes} bytes, "
        f"by blt {__version__} with torch {torch.__version__} on {device.type}{entropy_model}"
    )


def open_corpus(config: RunConfig, run: Path, reporter: Reporter) -> tuple[corpus.ByteShard, corpus.ByteShard]:
    """The run's training and held-out shards, built at the first start."""
    folder = run / "corpus"
    if not folder.exists():
        documents = read_documents(config.data.paths, raw=config.data.raw)
        with naming_the_place(folder):
            reporter.say(corpus.build_shards(documents, folder, config.data.held_out_fraction).sentence)
    return corpus.open_shard(folder, "train"), corpus.open_shard(folder, "held_out")


def fit_filter(embeddings: HashEmbeddings, shard: corpus.ByteShard, row_bytes: int, reporter: Reporter) -> None:
    """Find the n-grams that a shard's rows, each once, look up at least ``min_count`` times; the others read a common row."""
    counts, started, rows = FrequentNgrams(embeddings.config), time.perf_counter(), corpus.num_rows(shard, row_bytes)
    shown, at_once = started, max(1, COUNTED_BYTES // row_bytes)
    for begin in range(0, rows, at_once):
        counts.add(corpus.rows_of(shard, range(begin, min(begin + at_once, rows)), row_bytes)[:, :-1])
        if (now := time.perf_counter()) - shown > 5:
            shown = now
            reporter.show(HASH_TABLES, min(begin + at_once, rows), rows, f"{begin * row_bytes / 1e6:.2f} MB")
    embeddings.frequent.copy_(counts.bits())
    least = embeddings.config.min_count
    fullest = max(float((of_table >= least).mean()) for of_table in counts.counts)
    reporter.say(
        f"{HASH_TABLES}: n-grams counted in {time.perf_counter() - started:.1f} s; those met {least} times and more fill "
        f"{fullest:.0%} of the fullest filter"
    )


def fit_ngrams(
    config: NgramEntropyModelConfig, shard: corpus.ByteShard, metrics: Metrics, reporter: Reporter
) -> NgramEntropyModel:
    """The n-gram statistics of all text of a shard, from one pass over it; the same text gives the same tables."""
    counts, started = NgramCounts(config), time.perf_counter()
    shown = started
    for text, document_starts in shard.stretches(COUNTED_BYTES):
        counts.add(text, document_starts)
        if (now := time.perf_counter()) - shown > 5:
            shown, megabytes = (
                now,
                f"{counts.num_bytes / 1e6:.2f} MB  {counts.num_bytes / 1e6 / (now - started):.1f} MB/s",
            )
            reporter.show(ENTROPY_MODEL, counts.num_bytes, shard.num_bytes, megabytes)
    model, seconds = counts.model(), time.perf_counter() - started
    contexts = {str(order): counts.num_contexts(order) for order in range(EXACT_ORDER, config.max_order + 1)}
    metrics.forget_after(ENTROPY_MODEL, -1)
    metrics.write(
        {
            "phase": ENTROPY_MODEL,
            "step": 0,
            "bytes_seen": counts.num_bytes,
            "train_seconds": seconds,
            "contexts": contexts,
        }
    )
    reporter.say(
        f"{ENTROPY_MODEL}: n-grams of {counts.num_bytes / 1e6:.2f} MB counted in {seconds:.1f} s, contexts of "
        f"{config.max_order} bytes fill {counts.num_contexts(config.max_order) / 2**config.table_bits:.0%} of their table"
    )
    return model


def resolve_dtype(config: TrainingConfig, device: torch.device) -> TrainingConfig:
    """``auto`` becomes what is faster here, measured: bf16 matrix products beat fp32 on some CPUs and lose on others."""
    if config.dtype != "auto":
        return config
    faster = "bfloat16" if device.type == "cuda" else "float32"
    if device.type == "cpu":
        multiply_fast_in_fp32()
        single, half = (product_flops_per_second(dtype, device) for dtype in (torch.float32, torch.bfloat16))
        faster = "bfloat16" if half > BFLOAT16_GAIN * single else "float32"
    return config.model_copy(update={"dtype": faster})


def _claim_folder(config: RunConfig, run: Path, device: torch.device, resume: bool) -> RunConfig:
    """Write the resolved config into a new run folder, or take the one of the run that goes on."""
    config_file = run / "config.toml"
    if config_file.exists() and not resume:
        raise FileExistsError(f"{run} holds a run already; go on with it (--resume) or give another folder (--out)")
    if not config_file.exists():
        leftover = [name for name in ("corpus", "state", "model", "metrics.jsonl") if (run / name).exists()]
        if leftover:
            raise FileExistsError(f"{run / leftover[0]} is there, but no config.toml; give another folder (--out)")
        updates: dict[str, Any] = {"training": resolve_dtype(config.training, device)}
        if config.entropy_training is not None:
            updates["entropy_training"] = resolve_dtype(config.entropy_training, device)
        run.mkdir(parents=True, exist_ok=True)
        config = config.model_copy(update=updates)
        write_whole(config_file, to_toml(config))
        return config
    found = read_run_config(config_file)
    calibrates_again = not saved_steps(run / "state" / "network")  # nothing depends on the calibration yet
    started_with = found.model_copy(update={"calibration": config.calibration}) if calibrates_again else found
    if _without_dtypes(started_with) != _without_dtypes(config):
        raise ValueError(
            f"{run} was started with another config than this one; go on with its own: blt train {config_file} "
            f"--out {run} --resume"
        )
    if started_with != found:
        write_whole(config_file, to_toml(started_with))
    return started_with


def _without_dtypes(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(exclude={"training": {"dtype"}, "entropy_training": {"dtype"}})


def _trained_entropy_model(
    config: RunConfig,
    run: Path,
    device: torch.device,
    held_out: corpus.ByteShard,
    teacher: EntropyModel | None,
    optimise_job: Callable[[Job], None],
) -> EntropyModel:
    """This run's own entropy model."""
    assert isinstance(config.model.entropy_model, EntropyModelConfig) and config.entropy_training is not None
    entropy_model = EntropyModel(config.model.entropy_model)
    initialise(entropy_model, torch.Generator().manual_seed(config.entropy_training.seed))
    entropy_model.to(device)
    optimise_job(_entropy_job(entropy_model, config, run, held_out, teacher))
    return entropy_model


def _entropy_job(
    entropy_model: EntropyModel,
    config: RunConfig,
    run: Path,
    held_out: corpus.ByteShard,
    teacher: EntropyModel | None,
) -> Job:
    training = config.entropy_training
    assert training is not None
    documents = held_out.sample(training.evaluation_bytes, seed=0)
    device = next(entropy_model.parameters()).device

    def loss(inputs: ByteIds, targets: ByteIds, entropies: Entropies | None) -> Loss:
        logits = entropy_model(inputs)
        nats = next_id_loss(logits, targets)
        if teacher is None:
            return Loss(nats, nats, patches=0)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            teacher_logits = teacher(inputs)
        return Loss(distillation_loss(logits, teacher_logits, targets), nats, patches=0)

    def predict(ids: ByteIds) -> tuple[Tensor, None, PatchStarts]:
        return entropy_model(ids), None, torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.bool, device=device)

    def evaluate() -> dict[str, Any]:
        return {"valid_bits_per_byte": _scored(predict, documents, training.row_bytes, device).bits_per_byte}

    flops = 3 * entropy_model_flops(entropy_model.config, training.row_bytes)
    if teacher is not None:
        flops += entropy_model_flops(teacher.config, training.row_bytes)
    state = run / "state" / "entropy_model"
    return Job(ENTROPY_MODEL, entropy_model, training, state, loss, evaluate, lambda: None, lambda mean_patch: flops)


def _scored(predict: Predictor, documents: Sequence[Document], row_bytes: int, device: torch.device) -> Score:
    texts, prompts = [document.data for document in documents], [document.prompt_bytes for document in documents]
    return total_score(score_documents(predict, texts, row_bytes, device, prompt_bytes=prompts))


def _network_job(
    lm: LanguageModel,
    config: RunConfig,
    run: Path,
    held_out: corpus.ByteShard,
    scored: EntropyCache | None,
    lesson: Lesson | None,
) -> Job:
    patching, training = lm.config.patching, config.training
    if scored is not None and patching.rule == "entropy":
        assert patching.threshold_nats is not None
        scored.check_threshold(patching.threshold_nats)
    documents = held_out.sample(training.evaluation_bytes, seed=0)

    def loss(inputs: ByteIds, targets: ByteIds, entropies: Entropies | None) -> Loss:
        starts = lm.patch_starts(inputs) if entropies is None else patch_starts(inputs, entropies, patching)
        patches = int((starts[:, :-1] & (inputs >= BYTE_OFFSET)).sum())
        logits = lm.network(inputs, starts)
        nats = next_id_loss(logits, targets)
        return Loss(nats if lesson is None else lesson.objective(logits, inputs, targets, nats), nats, patches)

    def evaluate() -> dict[str, Any]:
        lm.network.eval()
        total = _scored(lm.predict, documents, training.row_bytes, lm.device)
        room = lm.config.max_bytes - 1
        prompt = documents[0].data[: min(documents[0].prompt_bytes or 64, room // 2)]
        sample = prompt + b"".join(lm.stream(prompt, min(SAMPLE_BYTES, room - len(prompt)), temperature=0.8))
        figures = {f"valid_{name}": value for name, value in total.as_json().items()}
        return figures | {"sample": sample.decode("utf-8", "replace")}

    def flops(mean_patch: float) -> float:
        counted = flops_per_byte(lm.config, mean_patch, training.row_bytes)
        spared = 0.0 if scored is None else counted.entropy_model
        return counted.training - spared + (0.0 if lesson is None else lesson.flops_per_byte)

    def save() -> None:
        LanguageModel(lm.config, lm.entropy_model, merged(lm.network), lm.card).save(run / "model")

    state, read = run / "state" / "network", None if scored is None else scored.entropies
    return Job(NETWORK, lm.network, training, state, loss, evaluate, save, flops, read)


def _calibrated(
    config: RunConfig,
    entropy_model: EntropyModel | NgramEntropyModel | None,
    device: torch.device,
    train_shard: corpus.ByteShard,
    held_out: corpus.ByteShard,
    scored: EntropyCache | None,
    metrics: Metrics,
    reporter: Reporter,
) -> ModelConfig:
    """The model config with its threshold: the config's own, or the one that gives the target mean patch size."""
    patching = config.model.patching
    if not patching.uses_entropies or patching.threshold_nats is not None:
        return config.model
    assert entropy_model is not None
    row_bytes, target = config.training.row_bytes, config.calibration.target_patch_bytes

    def rows_with_entropies(shard: corpus.ByteShard, scored: EntropyCache | None) -> tuple[ByteIds, Entropies]:
        rows_at_once = config.training.rows_per_step // config.training.micro_batches
        reader = corpus.BatchReader(shard, row_bytes, rows_at_once, seed=0)
        num_batches = -(-min(config.calibration.sample_bytes, shard.num_bytes) // (rows_at_once * row_bytes))
        batches, entropies = [], []
        for _ in range(num_batches):
            row_indices = reader.next_row_indices()
            batches.append(corpus.rows_of(shard, row_indices, row_bytes)[:, :-1].to(device))
            read = scored.entropies(row_indices).to(device) if scored else entropy_model.entropies(batches[-1])
            entropies.append(read)
        return torch.cat(batches), torch.cat(entropies)

    rows, entropies = rows_with_entropies(train_shard, scored)
    threshold = threshold_for_patch_size(entropies, rows, patching, target)
    if scored is not None and patching.rule == "entropy":
        threshold = scored.edge_below(threshold)  # the same patches, here and from entropies that are not rounded
    patching = patching.model_copy(update={"threshold_nats": threshold})
    reached = mean_patch_bytes(rows, patch_starts(rows, entropies, patching))
    rows, entropies = rows_with_entropies(held_out, None)
    reached_held_out = mean_patch_bytes(rows, patch_starts(rows, entropies, patching))
    report = {"threshold_nats": threshold, "target_patch_bytes": target, "train_patch_bytes": reached}
    metrics.forget_after("calibration", -1)
    metrics.write({"phase": "calibration", "step": 0} | report | {"valid_patch_bytes": reached_held_out})
    reporter.say(
        f"threshold {threshold:.4f} nats: patches of {reached:.2f} bytes on training text (asked: {target}), "
        f"{reached_held_out:.2f} on held-out text"
    )
    return config.model.model_copy(update={"patching": patching})

"""A corpus -> its entropy cache: ``blt entropies`` scores every training row once, in several processes, and can be resumed."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blt import corpus
from blt.checkpoint import naming_the_place, write_whole
from blt.config import CorpusConfig
from blt.documents import Document, read_documents
from blt.entropy_cache import CODES, FORMAT, PROGRESS, SPEC, Spec, read_spec, rows_done, weights_hash
from blt.language_model import model_folder
from blt.model.entropy_model import EntropyModel
from blt.model.ngram_entropy_model import NgramEntropyModel
from blt.model.patching import entropy_codes, entropy_edges
from blt.model_files import load_entropy_model
from blt.optimise import stop_after_this_step
from blt.processor import multiply_fast_in_fp32
from blt.progress import Reporter

CHUNK_IDS = 8192  # scored in one pass
SECONDS_PER_MARK, SECONDS_PER_REPORT = 2.0, 5.0


def score_corpus(
    model: str,
    data: CorpusConfig,
    folder: Path,
    row_bytes: int,
    processes: int,
    device: torch.device,
    reporter: Reporter,
) -> dict[str, Any]:
    """Score the training rows of a corpus into ``folder``, or go on with what is there; the figures of ``--json``.

    Raises ValueError for a model that has nothing to score with and for a folder of something else, KeyboardInterrupt after
    Ctrl-C, once what was scored is on disk.
    """
    multiply_fast_in_fp32()
    config, entropy_model = load_entropy_model(model_folder(model))
    if entropy_model is None:
        raise ValueError(f"{model} has no entropy model to score with: its patching rule is {config.patching.rule!r}")
    if isinstance(entropy_model, NgramEntropyModel):
        raise ValueError(
            f"{model} looks its entropies up in n-gram tables as fast as it could read them; just train with it"
        )
    if not 4 <= row_bytes <= config.max_bytes:
        raise ValueError(f"row_bytes must be 4 to {config.max_bytes}, what {model} can read, got {row_bytes}")
    if device.type != "cpu" and processes > 1:
        raise ValueError(f"several processes are for a CPU; leave out --processes with --device {device}")
    threshold = config.patching.threshold_nats if config.patching.rule == "entropy" else None
    spec, shard = _claim_folder(folder, entropy_model, threshold, data, row_bytes, reporter)
    done, started = rows_done(folder), time.perf_counter()
    rows = spec.num_rows - done
    if rows == 0:
        reporter.say(f"{folder} is finished already: {spec.num_rows:,} rows, {shard.num_bytes / 1e6:.2f} MB")
    chunk = max(1, CHUNK_IDS // row_bytes)
    firsts = range(done, spec.num_rows, chunk)
    chunks = (range(first, min(first + chunk, spec.num_rows)) for first in firsts)
    processes = min(processes, len(firsts))
    scorer = Scorer(entropy_model.to(device), shard, spec)
    in_processes = _scored_in_processes(model_folder(model), folder, chunks, processes)
    scoring = in_processes if processes > 1 else nullcontext(map(scorer.codes, chunks))
    with stop_after_this_step() as stop_requested, scoring as scored:
        done = _write_codes(folder, spec, done, scored, stop_requested, reporter)
    if done < spec.num_rows:
        reporter.say(f"stopped; what was scored is saved in {folder}, go on with the same command")
        raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    return {
        "bytes": shard.num_bytes,
        "rows": spec.num_rows,
        "rows_scored_now": rows,
        "seconds": seconds,
        "bytes_per_second": rows * row_bytes / seconds if rows else None,
        "spec_hash": spec.hash,
        "out": str(folder),
    }


@dataclass(frozen=True)
class Scorer:
    """All that turns rows of a shard into codes."""

    entropy_model: EntropyModel
    shard: corpus.ByteShard
    spec: Spec

    def codes(self, row_indices: range) -> NDArray[np.uint8]:
        """One row of codes for each row of ids: what training would score, in the same precision."""
        device = next(self.entropy_model.parameters()).device
        inputs = corpus.rows_of(self.shard, row_indices, self.spec.row_bytes)[:, :-1].to(device)
        edges = torch.tensor(self.spec.edges_nats, device=device)
        return entropy_codes(self.entropy_model.entropies(inputs), edges).cpu().numpy()


def _claim_folder(
    folder: Path,
    entropy_model: EntropyModel,
    threshold_nats: float | None,
    data: CorpusConfig,
    row_bytes: int,
    reporter: Reporter,
) -> tuple[Spec, corpus.ByteShard]:
    """The spec and the text of a folder: written where it is new, held against what is asked for where it is not."""
    begun, shards = (folder / SPEC).exists(), folder / "corpus"
    if folder.exists() and not begun:
        strangers = [path.name for path in folder.iterdir() if not path.name.startswith("corpus")]
        if strangers:
            raise ValueError(f"{folder} holds {strangers[0]} and no {SPEC}; give another folder with --out")

    def documents() -> Iterator[Document]:
        return read_documents(data.paths, data.raw)

    spec = Spec(
        format=FORMAT,
        entropy_model=entropy_model.config.model_dump(mode="json"),
        weights_hash=weights_hash(entropy_model),
        edges_nats=entropy_edges(threshold_nats).tolist(),
        row_bytes=row_bytes,
        held_out_fraction=data.held_out_fraction,
        fingerprint="",
        num_rows=0,
    )
    if begun:
        found = read_spec(folder)
        fingerprint = corpus.corpus_fingerprint(documents(), data.held_out_fraction)
        difference = found.difference(replace(spec, fingerprint=fingerprint, num_rows=found.num_rows))
        if difference:
            raise ValueError(f"{folder} is being scored with {difference}; give another --out, or delete {folder}")
    if not (begun and shards.exists()):
        with naming_the_place(shards):
            reporter.say(corpus.build_shards(documents(), shards, data.held_out_fraction).sentence)
    shard = corpus.open_shard(shards, "train")
    if begun:
        return found, shard
    spec = replace(spec, fingerprint=shard.fingerprint, num_rows=corpus.num_rows(shard, row_bytes))
    write_whole(folder / SPEC, json.dumps(asdict(spec) | {"spec_hash": spec.hash}, indent=1) + "\n")
    return spec, shard


def _write_codes(
    folder: Path,
    spec: Spec,
    done: int,
    scored: Iterable[NDArray[np.uint8]],
    stop_requested: Callable[[], bool],
    reporter: Reporter,
) -> int:
    """Write codes behind the first ``done`` rows until they end or a stop is asked for; how many rows there are then.

    Rows count only once they are on disk: a process that dies in between leaves some to be scored again.
    """
    path, first, begun = folder / CODES, done, time.monotonic()
    marked = reported = begun
    with naming_the_place(path), path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(done * spec.row_bytes)
        for codes in scored:
            file.write(codes.tobytes())
            done, now = done + len(codes), time.monotonic()
            last = done == spec.num_rows or stop_requested()
            if last or now - marked > SECONDS_PER_MARK:
                file.flush()
                os.fsync(file.fileno())
                write_whole(folder / PROGRESS, json.dumps({"rows": done}))
                marked = now
            if last or now - reported > SECONDS_PER_REPORT:
                speed = (done - first) * spec.row_bytes / (now - begun)
                figures = f"{done * spec.row_bytes / 1e6:.2f} MB  {speed / 1e3:.1f} kB/s"
                reporter.show("entropies", done, spec.num_rows, figures)
                reported = now
            if last:
                break
    return done


@contextmanager
def _scored_in_processes(
    model: Path, folder: Path, chunks: Iterable[range], processes: int
) -> Iterator[Iterator[NDArray[np.uint8]]]:
    """The codes of all chunks in order, a few of them ahead."""
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_enter_worker)

    def submit(chunk: range) -> Future[NDArray[np.uint8]]:
        with _interrupts_blocked():  # what starts here inherits it: Ctrl-C is the parent's business alone
            return pool.submit(_codes_in_worker, model, folder, chunk)

    def in_order() -> Iterator[NDArray[np.uint8]]:
        waiting: deque[Future[NDArray[np.uint8]]] = deque()
        for chunk in chunks:
            waiting.append(submit(chunk))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield in_order()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a scoring process died, perhaps for want of memory; go on with the same command and fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _enter_worker() -> None:
    """One thread for each worker, and none outlives its parent: it would wait for work for ever."""
    torch.set_num_threads(1)
    multiply_fast_in_fp32()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _codes_in_worker(model: Path, folder: Path, chunk: range) -> NDArray[np.uint8]:
    return _workers_scorer(model, folder).codes(chunk)


@cache
def _workers_scorer(model: Path, folder: Path) -> Scorer:
    """A worker's own, opened once. Raises ValueError where the model is no longer the one that the parent read."""
    spec, (_, entropy_model) = read_spec(folder), load_entropy_model(model)
    if not isinstance(entropy_model, EntropyModel) or weights_hash(entropy_model) != spec.weights_hash:
        raise ValueError(f"{model} was changed while it scored; start again with another --out")
    return Scorer(entropy_model, corpus.open_shard(folder / "corpus", "train"), spec)

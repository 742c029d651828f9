"""Does a BLT that begins with a token model's layers learn faster than one from nothing, at equal further bytes?

A small Llama learns a text; BLTs whose latent transformer is the Llama's, or fresh, or taught by the Llama, then learn from
the same text for the same number of bytes, and all are scored on a text that none has seen. Every stage that is there already
is left as it is, so a run that was cut goes on.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from claim import subplots
from small_llama import train_token_model

from blt import corpus
from blt.documents import read_documents

HERE = Path(__file__).parent
CONFIG = HERE / "from_token_model.toml"
FACTOR = "training.latent_learning_rate_factor"


def contenders(llama: Path) -> dict[str, tuple[bool, list[str]]]:
    """By name: whether it begins with the Llama's layers, and what it sets."""
    taught = [f"token_teacher.folder={json.dumps(str(llama))}", "token_teacher.weight=0.5"]
    return {
        "from nothing": (False, []),
        "token model's layers, a tenth of the rate": (True, [f"{FACTOR}=0.1"]),
        "token model's layers, the same rate": (True, [f"{FACTOR}=1.0"]),
        "from nothing, taught": (False, taught),
        "token model's layers, a tenth of the rate, taught": (True, [f"{FACTOR}=0.1", *taught]),
    }


def blt(*arguments: object) -> str:
    """Standard output of a command."""
    command = [sys.executable, "-m", "blt", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def run_contender(
    folder: Path, llama: Path, begins_with_llama: bool, settings: list[str], seed: int, options: Any
) -> dict[str, Any]:
    """Train one, unless it is there, and score it."""
    data = ["--data", options.data]
    common = [f"training.total_bytes={options.bytes}", f"training.seed={seed}", *settings]
    overrides = [word for setting in common for word in ("--set", setting)]
    config: Path = CONFIG
    if begins_with_llama:
        begun = folder.with_name(folder.name + ".begun")
        if not begun.exists():
            blt("convert", "--from-token-model", llama, "--config", CONFIG, "--set", f"training.seed={seed}", begun)
        config = begun / "train.toml"
    if not (folder / "evaluation.json").exists():
        resume = ["--resume"] if (folder / "config.toml").exists() else []
        blt("train", config, *data, *overrides, "--out", folder, *resume)
    scored = folder / "unseen.json"
    if not scored.exists():
        scored.write_text(blt("evaluate", folder, "--data", options.work / "unseen.jsonl", "--json"))
    reports = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [
        [report["bytes_seen"], report["valid_bits_per_byte"]] for report in reports if "valid_bits_per_byte" in report
    ]
    figures = json.loads(scored.read_text())
    flops = [report["train_flops"] for report in reports if "train_flops" in report][-1]
    return {
        "seed": seed,
        "bits_per_byte": figures["bits_per_byte"],
        "mean_patch_bytes": figures["mean_patch_bytes"],
        "train_flops": flops,
        "curve": curve,
    }


def token_model_bits(llama: Path, unseen: Path) -> float:
    """Bits per byte of the Llama on the unseen text: total bits over total bytes, documents cut into stretches."""
    scored = llama / "unseen.json"
    if scored.exists():
        return float(json.loads(scored.read_text()))
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    model, tokenizer = (
        LlamaForCausalLM.from_pretrained(llama).eval(),
        Tokenizer.from_file(str(llama / "tokenizer.json")),
    )
    nats, num_bytes = 0.0, 0
    with torch.no_grad():
        for document in read_documents([unseen]):
            tokens = [0, *tokenizer.encode(document.data.decode("utf-8", "replace"), add_special_tokens=False).ids]
            num_bytes += len(document.data)
            for begin in range(
                0, len(tokens) - 1, 128
            ):  # each token has half a stretch or more before it, or all there is
                stretch = torch.tensor([tokens[max(0, begin - 128) : begin + 129]])
                new = min(128, len(tokens) - 1 - begin)
                logits = model(input_ids=stretch[:, :-1], use_cache=False).logits[0, -new:]
                nats += float(torch.nn.functional.cross_entropy(logits, stretch[0, -new:], reduction="sum"))
    bits_per_byte = nats / num_bytes / math.log(2)
    scored.write_text(json.dumps(bits_per_byte) + "\n")
    return bits_per_byte


def excerpt(path: str, num_bytes: int, file: Path) -> Path:
    """So many bytes of a text, of the beginnings of all its documents alike; written once."""
    if not file.exists():
        texts = [document.data.decode("utf-8", "replace") for document in read_documents([path])]
        parts = [text[: num_bytes // len(texts)] for text in texts]
        file.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return file


def draw(results: dict[str, Any], path: Path) -> None:
    """Held-out bits per byte against further bytes, the mean of the seeds."""
    figure, axes = subplots(figsize=(7, 4.5))
    for name, runs in results["contenders"].items():
        curves = [[bits for _, bits in run["curve"]] for run in runs]
        megabytes = [num_bytes / 1e6 for num_bytes, _ in runs[0]["curve"]]
        means = [sum(bits) / len(bits) for bits in zip(*curves, strict=True)]
        axes.plot(megabytes, means, marker="o", markersize=3, label=name)
    axes.set_xlabel("further training, MB")
    axes.set_ylabel("held-out bits per byte")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data/train/en_books.00.jsonl.xz", help="text to learn")
    parser.add_argument("--unseen", default="../shared/data/eval/en_books.valid.jsonl.xz", help="text to score")
    parser.add_argument("--unseen-bytes", type=int, default=300_000, help="of it")
    parser.add_argument("--token-bytes", type=int, default=20_000_000, help="that the token model learns from")
    parser.add_argument("--bytes", type=int, default=1_000_000, help="that each BLT learns from")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="contenders whose names hold one of these words")
    parser.add_argument("--work", type=Path, default=Path("runs/from_token_model"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "from_token_model.json")
    options = parser.parse_args()
    for path in (options.data, options.unseen):
        if not Path(path).exists():
            parser.error(f"no file {path}; name the text with --data and --unseen")
    llama, shards = options.work / "llama", options.work / "corpus"
    options.work.mkdir(parents=True, exist_ok=True)
    if not shards.exists():
        corpus.build_shards(read_documents([options.data]), shards, held_out_fraction=0.03)
    if not (llama / "model.safetensors").exists():
        train_token_model(corpus.open_shard(shards, "train"), llama, options.token_bytes)
    unseen = excerpt(options.unseen, options.unseen_bytes, options.work / "unseen.jsonl")
    results: dict[str, Any] = {
        "command": "python experiments/from_token_model.py " + " ".join(sys.argv[1:]),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}",
        "token_model_bytes": options.token_bytes,
        "token_model_bits_per_byte": token_model_bits(llama, unseen),
        "bytes": options.bytes,
        "contenders": {},
    }
    print(f"token model: {results['token_model_bits_per_byte']:.3f} bits per unseen byte", flush=True)
    for seed in range(options.seeds):
        for name, (begins_with_llama, settings) in contenders(llama).items():
            if options.only and not any(word in name for word in options.only):
                continue
            started = time.perf_counter()
            folder = options.work / f"{name.replace(' ', '_').replace(',', '').replace(chr(39), '')}.{seed}"
            found = run_contender(folder, llama, begins_with_llama, settings, seed, options)
            results["contenders"].setdefault(name, []).append(found)
            seconds = time.perf_counter() - started
            print(
                f"{name}, seed {seed}: {found['bits_per_byte']:.4f} bits per unseen byte ({seconds:.0f} s)", flush=True
            )
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=2) + "\n")
    draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

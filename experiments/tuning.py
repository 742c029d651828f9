"""How the contenders of the claims were tuned: one change at a time, on 4 MB, scored on validation text.

Every contender gets the same care: its learning rates, rows per step, shape, and the size of its units and tables.
"""

import argparse
import json
from pathlib import Path

from claim import write
from contenders import HERE, Contender, reference_flops, run
from texts import MIXES, mixed, paths_of

# where tuning began: what a first look, at four times the FLOPs per byte, had found (docs/log.md)
BLT = Contender("blt")
BPE = Contender(
    "bpe", {"training.learning_rate": 2e-3, "training.table_learning_rate": 4e-2}, width=256, vocabulary=4096
)
BYTES = Contender("bytes", {"training.learning_rate": 2e-3, "training.table_learning_rate": 2e-2}, width=128)
LOCAL_96 = {"width": 96, "num_heads": 2, "ffn_width": 256, "window_positions": 128}
TRIALS = {
    "BLT": BLT,
    "BLT, fixed 4": BLT.but(model__patching__rule="fixed", model__patching__patch_bytes=4, model__entropy_model=None),
    "BLT, space": BLT.but(model__patching__rule="space", model__entropy_model=None),
    "BLT, where entropy rises": BLT.but(model__patching__rule="entropy_rise"),
    "BLT, 4 slots": BLT.but(model__slots_per_patch=4),
    "BLT, fixed 4, 4 slots": BLT.but(
        model__patching__rule="fixed",
        model__patching__patch_bytes=4,
        model__entropy_model=None,
        model__slots_per_patch=4,
    ),
    "BLT, decoder of 1": BLT.but(model__local_decoder__num_layers=1),
    "BLT, decoder of 3": BLT.but(model__local_decoder__num_layers=3),
    "BLT, rate 2e-3": BLT.but(training__learning_rate=2e-3),
    "BLT, rate 5e-3": BLT.but(training__learning_rate=5e-3),
    "BLT, table rate 1e-2": BLT.but(training__table_learning_rate=1e-2),
    "BLT, table rate 4e-2": BLT.but(training__table_learning_rate=4e-2),
    "BLT, 4 rows": BLT.but(training__rows_per_step=4),
    "BLT, patches of 3.5": BLT.but(calibration__target_patch_bytes=3.5),
    "BLT, patches of 6": BLT.but(calibration__target_patch_bytes=6.0),
    "BLT, tables of 16k": BLT.but(model__hash_embeddings__table_rows=16_384),
    "BLT, tables of 262k": BLT.but(model__hash_embeddings__table_rows=262_144),
    "BLT, latent of 256": BLT.but(model__latent__width=256, model__latent__num_heads=4, model__latent__ffn_width=704),
    "BLT, local parts of 96": BLT.but(
        model__local_encoder={"num_layers": 1, **LOCAL_96}, model__local_decoder={"num_layers": 1, **LOCAL_96}
    ),
    "BPE": BPE,
    "BPE, rate 1e-3": BPE.but(training__learning_rate=1e-3),
    "BPE, rate 4e-3": BPE.but(training__learning_rate=4e-3),
    "BPE, table rate 2e-2": BPE.but(training__table_learning_rate=2e-2),
    "BPE, table rate 1e-1": BPE.but(training__table_learning_rate=1e-1),
    "BPE, 4 rows": BPE.but(training__rows_per_step=4),
    "BPE, vocabulary 2048": BPE.but(vocabulary=2048),
    "BPE, vocabulary 8192, width 192": BPE.but(vocabulary=8192, width=192),
    "BPE, width 192": BPE.but(width=192),
    "BPE, width 128": BPE.but(width=128),
    "bytes": BYTES,
    "bytes, rate 1e-3": BYTES.but(training__learning_rate=1e-3),
    "bytes, rate 4e-3": BYTES.but(training__learning_rate=4e-3),
    "bytes, 4 rows": BYTES.but(training__rows_per_step=4),
    "bytes, width 64": BYTES.but(width=64),
    "bytes, width 192": BYTES.but(width=192),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with train/ and eval/")
    parser.add_argument("--mix", choices=tuple(MIXES), default="english")
    parser.add_argument("--bytes", type=int, default=4_000_000, help="that each trial learns from")
    parser.add_argument("--only", nargs="*", help="trials whose names hold one of these words")
    parser.add_argument("--dtype", default="auto", help="of matrix products")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "tuning.json")
    options = parser.parse_args()
    text = mixed(
        paths_of(options.data, options.mix, "train"),
        options.bytes,
        options.work / "texts" / f"{options.mix}.train.{options.bytes}.jsonl",
    )
    valid = mixed(
        paths_of(options.data, options.mix, "valid"), 200_000, options.work / "texts" / f"{options.mix}.valid.jsonl"
    )
    for name, contender in TRIALS.items():
        if options.only and not any(word in name for word in options.only):
            continue
        folder = folder_of(name, options)
        found = run(contender, text, {"valid": valid}, folder, reference_flops(), dtype=options.dtype)
        print(f"{name}: {found['bits_per_byte']['valid']:.4f}", flush=True)
    folders = {name: folder_of(name, options) / "result.json" for name in TRIALS}
    trials = {name: json.loads(file.read_text()) for name, file in folders.items() if file.exists()}
    write(options.out, {"mix": options.mix, "trials": trials})


def folder_of(name: str, options: argparse.Namespace) -> Path:
    return options.work / "tuning" / options.mix / name.replace(", ", ".").replace(" ", "_")


if __name__ == "__main__":
    main()

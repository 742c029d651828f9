"""How the contenders of the claims were tuned: one change at a time, on 2 MB, scored on validation text, in two rounds.

Every contender gets the same care: its learning rates, rows per step, shape, and the size of its units and tables.
"""

import argparse
import json
from pathlib import Path

from claim import write
from contenders import HERE, Contender, reference_flops, run
from texts import MIXES, mixed, paths_of

# where tuning began: for BLT the preset small, for the others what a first look at rates gave
BLT = Contender("blt")
BPE = Contender(
    "bpe", {"training.learning_rate": 1e-3, "training.table_learning_rate": 2e-2}, width=320, vocabulary=4096
)
BYTES = Contender("bytes", {"training.learning_rate": 2e-3, "training.table_learning_rate": 2e-2}, width=192)
# the second round begins with what was best of the first
BLT_2 = BLT.but(model__hash_embeddings__table_rows=65536, training__rows_per_step=4)
BYTES_2 = BYTES.but(training__rows_per_step=4)
BPE_2 = BPE.but(training__table_learning_rate=6e-2, width=384)
BPE_3 = BPE_2.but(width=512, vocabulary=8192)
TRIALS = {
    "BLT": BLT,
    "BLT, rate 2e-3": BLT.but(training__learning_rate=2e-3),
    "BLT, rate 5e-3": BLT.but(training__learning_rate=5e-3),
    "BLT, table rate 1e-2": BLT.but(training__table_learning_rate=1e-2),
    "BLT, table rate 4e-2": BLT.but(training__table_learning_rate=4e-2),
    "BLT, 4 rows": BLT.but(training__rows_per_step=4),
    "BLT, patches of 3.5": BLT.but(calibration__target_patch_bytes=3.5),
    "BLT, patches of 5.5": BLT.but(calibration__target_patch_bytes=5.5),
    "BLT, tables of 8k": BLT.but(model__hash_embeddings__table_rows=8192),
    "BLT, tables of 65k": BLT.but(model__hash_embeddings__table_rows=65536),
    "BLT, decoder of 2": BLT.but(model__local_decoder__num_layers=2),
    "BLT, decoder of 4": BLT.but(model__local_decoder__num_layers=4),
    "BLT, latent of 320": BLT.but(model__latent__width=320, model__latent__num_heads=5, model__latent__ffn_width=880),
    "BPE": BPE,
    "BPE, rate 5e-4": BPE.but(training__learning_rate=5e-4),
    "BPE, rate 2e-3": BPE.but(training__learning_rate=2e-3),
    "BPE, table rate 6e-3": BPE.but(training__table_learning_rate=6e-3),
    "BPE, table rate 6e-2": BPE.but(training__table_learning_rate=6e-2),
    "BPE, 4 rows": BPE.but(training__rows_per_step=4),
    "BPE, vocabulary 2048": BPE.but(vocabulary=2048),
    "BPE, vocabulary 8192": BPE.but(vocabulary=8192),
    "BPE, width 256": BPE.but(width=256),
    "BPE, width 384": BPE.but(width=384),
    "bytes": BYTES,
    "bytes, rate 1e-3": BYTES.but(training__learning_rate=1e-3),
    "bytes, rate 3e-3": BYTES.but(training__learning_rate=3e-3),
    "bytes, table rate 6e-3": BYTES.but(training__table_learning_rate=6e-3),
    "bytes, 4 rows": BYTES.but(training__rows_per_step=4),
    "bytes, width 128": BYTES.but(width=128),
    "bytes, width 256": BYTES.but(width=256),
    "BLT 2": BLT_2,
    "BLT 2, 8 rows, patches of 5.5": BLT_2.but(training__rows_per_step=8, calibration__target_patch_bytes=5.5),
    "BLT 2, tables of 262k": BLT_2.but(model__hash_embeddings__table_rows=262_144),
    "BLT 2, rate 2e-3": BLT_2.but(training__learning_rate=2e-3),
    "BLT 2, windows of 128": BLT_2.but(
        model__local_encoder__window_positions=128, model__local_decoder__window_positions=128
    ),
    "bytes 2, 2 rows": BYTES_2.but(training__rows_per_step=2),
    "bytes 2, rate 1e-3": BYTES_2.but(training__learning_rate=1e-3),
    "bytes 2, rate 3e-3": BYTES_2.but(training__learning_rate=3e-3),
    "BPE 2": BPE_2,
    "BPE 2, table rate 2e-1": BPE_2.but(training__table_learning_rate=2e-1),
    "BPE 2, width 512": BPE_2.but(width=512),
    "BPE 2, vocabulary 8192": BPE_2.but(vocabulary=8192),
    "BPE 2, rate 5e-4": BPE_2.but(training__learning_rate=5e-4),
    "BPE 3": BPE_3,
    "BPE 3, vocabulary 12288": BPE_3.but(vocabulary=12_288),
    "BPE 3, width 640": BPE_3.but(width=640),
    "BPE 3, 4 rows": BPE_3.but(training__rows_per_step=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with train/ and eval/")
    parser.add_argument("--mix", choices=tuple(MIXES), default="english")
    parser.add_argument("--bytes", type=int, default=2_000_000, help="that each trial learns from")
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

"""How the contenders of the claims were tuned: one change at a time, on 8 MB, scored on validation text.

Every contender gets the same care: its learning rates, rows per step, shape, and the size of its units and tables.
"""

import argparse
import json
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from claim import write
from contenders import BPE_RATES, FIXED_4, HERE, LARGE_FLOPS, PAPER_BLT, REFERENCE_FLOPS, WIDE_LOCAL, Contender, run
from contenders import CONTENDERS as BEST
from texts import MIXES, mixed, paths_of

FIXED = {name.replace("__", "."): value for name, value in FIXED_4.items()}
NO_TABLES = {"model.hash_embeddings.table_rows": 1}
LOCAL_32 = {"num_layers": 1, "width": 32, "num_heads": 1, "ffn_width": 88, "window_positions": 64}
LOCAL_48 = {"num_layers": 1, "width": 48, "num_heads": 1, "ffn_width": 128, "window_positions": 64}

# where tuning began: what two first looks, at more FLOPs per byte, had found (docs/log.md)
BLT = Contender("blt")
BPE = Contender(
    "bpe", {"training.learning_rate": 3e-3, "training.table_learning_rate": 1e-1}, width=128, vocabulary=2048
)
BYTES = Contender(
    "bytes",
    {"training.learning_rate": 2e-3, "training.table_learning_rate": 2e-2, "training.rows_per_step": 4},
    width=64,
)
# then from the best rates; then from wider local parts, which gained most
SECOND_BLT = BLT.but(training__learning_rate=8e-3)
SECOND_BPE = BPE.but(training__learning_rate=5e-3, training__table_learning_rate=5e-2)
THIRD_BLT = SECOND_BLT.but(model__local_encoder=LOCAL_48, model__local_decoder=LOCAL_48)
MUON = {"training.matrix_optimizer": "muon"}
TWO_LAYERS = {"model.local_decoder": {**LOCAL_48, "num_layers": 2}, "training.rows_per_step": 16}


def with_settings(contender: Contender, *settings: Mapping[str, Any]) -> Contender:
    return replace(contender, settings=dict(ChainMap(*map(dict, settings), dict(contender.settings))))


# once AdamW had proved to leave the latent transformer asleep (docs/log.md), all of them with Muon
MUON_BLT = with_settings(THIRD_BLT.but(training__rows_per_step=16), MUON)
MUON_BPE = with_settings(SECOND_BPE.but(training__table_learning_rate=1e-1), MUON)
MUON_BYTES = with_settings(BYTES.but(width=48), MUON)

TRIALS = {
    "BLT": BLT,
    "BLT, fixed 4": with_settings(BLT, FIXED),
    "BLT, table rate 1e-2": BLT.but(training__table_learning_rate=1e-2),
    "BLT, rate 5e-3": BLT.but(training__learning_rate=5e-3),
    "BLT, rate 8e-3": SECOND_BLT,
    "BLT, rate 12e-3": BLT.but(training__learning_rate=12e-3),
    "second BLT, fixed 4": with_settings(SECOND_BLT, FIXED),
    "second BLT, 4 rows": SECOND_BLT.but(training__rows_per_step=4),
    "second BLT, where entropy rises": SECOND_BLT.but(model__patching__rule="entropy_rise"),
    "second BLT, patches of 3.5": SECOND_BLT.but(calibration__target_patch_bytes=3.5),
    "second BLT, decoder of 1": SECOND_BLT.but(model__local_decoder__num_layers=1),
    "second BLT, tables of 262k": SECOND_BLT.but(model__hash_embeddings__table_rows=262_144),
    "second BLT, local parts of 48": THIRD_BLT,
    "third BLT, fixed 4": with_settings(THIRD_BLT, FIXED),
    "third BLT, where entropy rises": THIRD_BLT.but(model__patching__rule="entropy_rise"),
    "third BLT, rate 12e-3": THIRD_BLT.but(training__learning_rate=12e-3),
    "third BLT, 16 rows": THIRD_BLT.but(training__rows_per_step=16),
    "third BLT, 16 rows, n-grams of 3 to 16": THIRD_BLT.but(
        training__rows_per_step=16, model__hash_embeddings__ngram_bytes=[3, 4, 6, 8, 11, 16]
    ),
    "third BLT, 16 rows, n-grams of 2 to 12": THIRD_BLT.but(
        training__rows_per_step=16, model__hash_embeddings__ngram_bytes=[2, 3, 4, 6, 8, 12]
    ),
    "third BLT, decoder of 2": THIRD_BLT.but(model__local_decoder={**LOCAL_48, "num_layers": 2}),
    "third BLT, decoder of 2, 16 rows": with_settings(THIRD_BLT, TWO_LAYERS),
    "third BLT, decoder of 2, 16 rows, table rate 4e-2": with_settings(
        THIRD_BLT, TWO_LAYERS, {"training.table_learning_rate": 4e-2}
    ),
    "third BLT, no tables": with_settings(THIRD_BLT, NO_TABLES),
    "third BLT, fixed 4, no tables": with_settings(THIRD_BLT, FIXED, NO_TABLES),
    "BPE": BPE,
    "BPE, rate 2e-3": BPE.but(training__learning_rate=2e-3),
    "BPE, rate 5e-3": BPE.but(training__learning_rate=5e-3),
    "BPE, rate 8e-3": BPE.but(training__learning_rate=8e-3),
    "BPE, table rate 2e-2": BPE.but(training__table_learning_rate=2e-2),
    "BPE, table rate 5e-2": BPE.but(training__table_learning_rate=5e-2),
    "BPE, table rate 2e-1": BPE.but(training__table_learning_rate=2e-1),
    "BPE, vocabulary 1024": BPE.but(vocabulary=1024),
    "BPE, width 96": BPE.but(width=96),
    "BPE, width 64": BPE.but(width=64),
    "second BPE": SECOND_BPE,
    "second BPE, 4 rows": SECOND_BPE.but(training__rows_per_step=4),
    "second BPE, 16 rows": SECOND_BPE.but(training__rows_per_step=16),
    "second BPE, width 96, vocabulary 3072": SECOND_BPE.but(width=96, vocabulary=3072),
    "second BPE, width 96, vocabulary 3072, table rate 1e-1": SECOND_BPE.but(
        width=96, vocabulary=3072, training__table_learning_rate=1e-1
    ),
    "bytes": BYTES,
    "bytes, rate 4e-3": BYTES.but(training__learning_rate=4e-3),
    "bytes, 2 rows": BYTES.but(training__rows_per_step=2),
    "bytes, width 96": BYTES.but(width=96),
    "bytes, width 48": BYTES.but(width=48),
    "Muon BLT": MUON_BLT,
    "Muon BLT, fixed 4": with_settings(MUON_BLT, FIXED),
    "Muon BLT, rate 5e-3": MUON_BLT.but(training__learning_rate=5e-3),
    "Muon BLT, rate 12e-3": MUON_BLT.but(training__learning_rate=12e-3),
    "Muon BLT, rate 18e-3": MUON_BLT.but(training__learning_rate=18e-3),
    "Muon BLT, rate 12e-3, 8 rows": MUON_BLT.but(training__learning_rate=12e-3, training__rows_per_step=8),
    "Muon BLT, decay 0.02": MUON_BLT.but(training__weight_decay=0.02),
    "Muon BLT, table rate 1e-2": MUON_BLT.but(training__table_learning_rate=1e-2),
    "Muon BLT, table rate 4e-2": MUON_BLT.but(training__table_learning_rate=4e-2),
    "Muon BLT, 8 rows": MUON_BLT.but(training__rows_per_step=8),
    "Muon BLT, where entropy rises": MUON_BLT.but(model__patching__rule="entropy_rise"),
    "Muon BLT, patches of 3.5": MUON_BLT.but(calibration__target_patch_bytes=3.5),
    "Muon BLT, patches of 6": MUON_BLT.but(calibration__target_patch_bytes=6.0),
    "Muon BLT, local parts of 32": MUON_BLT.but(model__local_encoder=LOCAL_32, model__local_decoder=LOCAL_32),
    "Muon BLT, n-gram patcher of 3": MUON_BLT.but(model__entropy_model__max_order=3),
    "Muon BLT, n-gram patcher of 4": MUON_BLT.but(model__entropy_model__max_order=4),
    "Muon BLT, windows of 256 in the decoder": MUON_BLT.but(model__local_decoder={**LOCAL_48, "window_positions": 256}),
    "Muon BLT, tables of 262k": MUON_BLT.but(model__hash_embeddings__table_rows=262_144),
    "Muon BLT, decoder of 2": MUON_BLT.but(model__local_decoder={**LOCAL_48, "num_layers": 2}),
    "Muon BLT, latent width 96": MUON_BLT.but(
        model__latent__width=96, model__latent__ffn_width=264, model__latent__num_heads=2
    ),
    "Muon BLT, latent width 192": MUON_BLT.but(
        model__latent__width=192, model__latent__ffn_width=528, model__latent__num_heads=3
    ),
    "Muon BPE": MUON_BPE,
    "Muon BPE, rate 8e-3": MUON_BPE.but(training__learning_rate=8e-3),
    "Muon BPE, rate 12e-3": MUON_BPE.but(training__learning_rate=12e-3),
    "Muon BPE, rate 18e-3": MUON_BPE.but(training__learning_rate=18e-3),
    "Muon BPE, rate 27e-3": MUON_BPE.but(training__learning_rate=27e-3),
    "Muon BPE, rate 12e-3, table rate 2e-1": MUON_BPE.but(
        training__learning_rate=12e-3, training__table_learning_rate=2e-1
    ),
    "Muon BPE, rate 12e-3, 4 rows": MUON_BPE.but(training__learning_rate=12e-3, training__rows_per_step=4),
    "Muon BPE, rate 12e-3, width 96": MUON_BPE.but(training__learning_rate=12e-3, width=96),
    "Muon BPE, rate 8e-3, 16 rows": MUON_BPE.but(training__learning_rate=8e-3, training__rows_per_step=16),
    "Muon BPE, rate 8e-3, table rate 5e-2": MUON_BPE.but(
        training__learning_rate=8e-3, training__table_learning_rate=5e-2
    ),
    "Muon BPE, rate 8e-3, width 96, vocabulary 3072": MUON_BPE.but(
        training__learning_rate=8e-3, width=96, vocabulary=3072
    ),
    "Muon BPE, rate 18e-3, decay 0.02": MUON_BPE.but(training__learning_rate=18e-3, training__weight_decay=0.02),
    "Muon BPE, rate 8e-3, decay 0.02": MUON_BPE.but(training__learning_rate=8e-3, training__weight_decay=0.02),
    "Muon BPE with tables": replace(BEST["BPE"], tables=True),
    "Muon BPE with tables, table rate 5e-2": replace(BEST["BPE"], tables=True).but(training__table_learning_rate=5e-2),
    "Muon BPE with tables, table rate 2e-2": replace(BEST["BPE"], tables=True).but(training__table_learning_rate=2e-2),
    "Muon bytes": MUON_BYTES,
    "Muon bytes, rate 4e-3": MUON_BYTES.but(training__learning_rate=4e-3),
    "Muon bytes, rate 8e-3": MUON_BYTES.but(training__learning_rate=8e-3),
    "Muon bytes, rate 12e-3": MUON_BYTES.but(training__learning_rate=12e-3),
    "Muon bytes, rate 18e-3": MUON_BYTES.but(training__learning_rate=18e-3),
    "Muon bytes, rate 12e-3, 8 rows": MUON_BYTES.but(training__learning_rate=12e-3, training__rows_per_step=8),
    "Muon bytes, rate 12e-3, table rate 6e-2": MUON_BYTES.but(
        training__learning_rate=12e-3, training__table_learning_rate=6e-2
    ),
    "Muon bytes, rate 4e-3, 8 rows": MUON_BYTES.but(training__learning_rate=4e-3, training__rows_per_step=8),
    "Muon bytes, rate 4e-3, width 64": MUON_BYTES.but(training__learning_rate=4e-3, width=64),
}

LOCAL_64 = {**WIDE_LOCAL, "width": 64, "ffn_width": 176}
LARGE_BLT = PAPER_BLT.but(
    model__local_encoder=LOCAL_64,
    model__local_decoder=LOCAL_64,
    model__latent__width=256,
    model__latent__num_heads=4,
    model__latent__ffn_width=704,
)
LARGE_BLT_OF_96 = LARGE_BLT.but(model__local_encoder=WIDE_LOCAL, model__local_decoder=WIDE_LOCAL)
SECOND_LARGE_BLT = LARGE_BLT_OF_96.but(model__local_decoder={**WIDE_LOCAL, "num_layers": 2})
# then, as 50 MB had shown what one latent layer lacks, with most of the FLOPs for the latent transformer
THIN_LOCAL = {**WIDE_LOCAL, "ffn_width": 96}
LATENT_192 = {"model.latent.width": 192, "model.latent.ffn_width": 528, "model.latent.num_heads": 3}
THIRD_LARGE_BLT = LARGE_BLT_OF_96.but(model__hash_embeddings__table_rows=262_144, model__slots_per_patch=2)
THIN_BLT = with_settings(
    THIRD_LARGE_BLT.but(model__local_encoder=THIN_LOCAL, model__local_decoder=THIN_LOCAL), LATENT_192
)
FOURTH_LARGE_BLT = THIN_BLT.but(
    model__local_decoder={**THIN_LOCAL, "num_layers": 2, "window_positions": 512}, training__learning_rate=5e-3
)
LARGE_BPE = Contender("bpe", BPE_RATES, width=192, vocabulary=4096)
SECOND_LARGE_BPE = LARGE_BPE.but(training__learning_rate=5e-3)
LARGE_TRIALS = {  # at four times the FLOPs, from the best of the above
    "large BLT": LARGE_BLT,
    "large BLT, rate 5e-3": LARGE_BLT.but(training__learning_rate=5e-3),
    "large BLT, local parts of 96": LARGE_BLT_OF_96,
    "large BLT, local parts of 96, rate 5e-3": LARGE_BLT_OF_96.but(training__learning_rate=5e-3),
    "large BLT, local parts of 96, decoder of 2": SECOND_LARGE_BLT,
    "second large BLT, tables of 262k": SECOND_LARGE_BLT.but(model__hash_embeddings__table_rows=262_144),
    "second large BLT, patches of 6": SECOND_LARGE_BLT.but(calibration__target_patch_bytes=6.0),
    "second large BLT, 8 rows": SECOND_LARGE_BLT.but(training__rows_per_step=8),
    "second large BLT, latent width 192": SECOND_LARGE_BLT.but(
        model__latent__width=192, model__latent__ffn_width=528, model__latent__num_heads=3
    ),
    "second large BLT, windows of 256 in the decoder": SECOND_LARGE_BLT.but(
        model__local_decoder={**WIDE_LOCAL, "num_layers": 2, "window_positions": 256}
    ),
    "third large BLT": THIRD_LARGE_BLT,
    "third large BLT, local parts of 64": THIRD_LARGE_BLT.but(
        model__local_encoder=LOCAL_64, model__local_decoder=LOCAL_64
    ),
    "third large BLT, rate 5e-3": THIRD_LARGE_BLT.but(training__learning_rate=5e-3),
    "thin large BLT": THIN_BLT,
    "thin large BLT, decoder of 2": THIN_BLT.but(model__local_decoder={**THIN_LOCAL, "num_layers": 2}),
    "thin large BLT, patches of 6": THIN_BLT.but(calibration__target_patch_bytes=6.0),
    "thin large BLT, patches of 6, rate 5e-3": THIN_BLT.but(
        calibration__target_patch_bytes=6.0, training__learning_rate=5e-3
    ),
    "third large BLT, windows of 512 in the decoder": THIRD_LARGE_BLT.but(
        model__local_decoder={**WIDE_LOCAL, "window_positions": 512}
    ),
    "thin large BLT, decoder of 2, its windows of 512": THIN_BLT.but(
        model__local_decoder={**THIN_LOCAL, "num_layers": 2, "window_positions": 512}
    ),
    "fourth large BLT": FOURTH_LARGE_BLT,
    "fourth large BLT, 8 rows": FOURTH_LARGE_BLT.but(training__rows_per_step=8),
    "large BPE": LARGE_BPE,
    "large BPE, rate 8e-3": LARGE_BPE.but(training__learning_rate=8e-3),
    "large BPE, rate 5e-3": SECOND_LARGE_BPE,
    "large BPE, rate 3e-3": LARGE_BPE.but(training__learning_rate=3e-3),
    "large BPE, width 256": LARGE_BPE.but(width=256),
    "large BPE, vocabulary 2048": LARGE_BPE.but(vocabulary=2048),
    "second large BPE, width 256": SECOND_LARGE_BPE.but(width=256),
    "second large BPE, vocabulary 2048": SECOND_LARGE_BPE.but(vocabulary=2048),
    "second large BPE, table rate 5e-2": SECOND_LARGE_BPE.but(training__table_learning_rate=5e-2),
    "second large BPE, 16 rows": SECOND_LARGE_BPE.but(training__rows_per_step=16),
    "second large BPE, decay 0.02": SECOND_LARGE_BPE.but(training__weight_decay=0.02),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with train/ and eval/")
    parser.add_argument("--mix", choices=tuple(MIXES), default="english")
    parser.add_argument("--bytes", type=int, default=8_000_000, help="that each trial learns from")
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
    every = [
        (name, of[name], flops) for of, flops in ((TRIALS, REFERENCE_FLOPS), (LARGE_TRIALS, LARGE_FLOPS)) for name in of
    ]
    for name, contender, flops in every:
        if options.only and not any(word in f"{name}." for word in options.only):
            continue
        folder = folder_of(name, options)
        found = run(contender, text, {"valid": valid}, folder, flops, dtype=options.dtype)
        print(f"{name}: {found['bits_per_byte']['valid']:.4f}", flush=True)
    folders = {name: folder_of(name, options) / "result.json" for name, *_ in every}
    trials = {name: json.loads(file.read_text()) for name, file in folders.items() if file.exists()}
    write(options.out, {"mix": options.mix, "trials": trials})


def folder_of(name: str, options: argparse.Namespace) -> Path:
    size = f"{options.bytes / 1e6:g}MB"
    return options.work / "tuning" / options.mix / size / name.replace(", ", ".").replace(" ", "_")


if __name__ == "__main__":
    main()

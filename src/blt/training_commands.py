"""The commands that make a model, or what one is made from: ``blt demo``, ``blt train``, ``blt entropies``."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from blt.command_options import Options, Output, Paths, print_flops, print_json, reporter_for

if TYPE_CHECKING:
    from blt.config import RunConfig
    from blt.language_model import LanguageModel

EntropyKind = Annotated[Literal["transformer", "ngram"], Parameter(help="A network, or n-gram counts.")]


def demo(*, out: Path = Path("runs/demo"), entropy_model: EntropyKind = "ngram", options: Options = Options()) -> None:
    """The main job at small scale: trains on Python's own library, evaluates, writes text, draws the picture.

    A demo that was interrupted goes on where it stopped.
    """
    from blt.config_file import read_run_config
    from blt.evaluate import evaluation_line
    from blt.report import patched_text, terminal_lines

    config = _with_options(read_run_config("demo" if entropy_model == "ngram" else "demo_transformer"), options)
    lm, evaluation = _train(config, out, options, resume=True)
    prompt = b"def read_lines(path):\n"
    sample = prompt + b"".join(lm.stream(prompt, 200, temperature=0.9, seed=options.seed or 0))
    text = "import os\n\ndef home():\n    return os.path.expanduser('~')\n"
    if options.json:
        print_json(evaluation | {"sample": sample.decode("utf-8", "replace")})
        return
    columns = shutil.get_terminal_size().columns
    print(f"\nIt writes (temperature 0.9):\n\n{sample.decode('utf-8', 'replace')}\n")
    print("It reads: | where a patch starts, under each byte how unsure the entropy model was\n")
    print("\n".join(terminal_lines(patched_text(lm, text), columns)))
    print(f"\nOn held-out files, in bits per byte:\n{evaluation_line(evaluation)}")
    if (out / "report.html").exists():
        print(f"Curves, samples and patches: {out}/report.html")
    blt = "blt" if shutil.which("blt") else sys.argv[0] if sys.argv[0].endswith("blt") else f"{sys.executable} -m blt"
    print(
        f"\nNext:\n  {blt} generate {out} 'class Stack:' --temperature 0.9\n"
        f"  {blt} patch {out} 'for line in open(path):' -o patches.html\n"
        f"  {blt} train small --data FOLDER --out runs/mine"
    )


def train(
    config: str | None = None,
    *,
    init: str | None = None,
    data: Paths = None,
    raw: Annotated[bool, Parameter(negative=())] = False,
    entropies: Path | None = None,
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    options: Options = Options(),
) -> None:
    """Train an entropy model (unless one is given), calibrate the threshold, train the network. Or go on with a model.

    Ctrl-C saves; --resume continues, on a CPU to the bit.

    Parameters
    ----------
    config
        A .toml file or the name of a preset: demo, demo_transformer, tiny, small, blt_1b, blt_8b; with --init: finetune.
    init
        Go on with the network of this model (a run folder, a model's folder, or a hub id) instead of fresh weights. Its entropy
        model and threshold stay as they are. Adapters instead of whole matrices: --set lora.rank=8.
    data
        Files and folders to train on, or stdlib; instead of the config's. Of rows with prompt and response, instead of text,
        the response is learned.
    raw
        Take every file as one document of bytes.
    entropies
        The folder of blt entropies over this text; the config names their model as pretrained_entropy_model.
    out
        The run folder; default runs/NAME.
    resume
        Go on with the run in the folder.
    set_
        Override a config value, as in --set model.latent.num_layers=4; may be repeated.
    dry_run
        Show the resolved config, parameters and FLOPs, and train nothing.
    """
    from blt.config_file import read_run_config, to_toml
    from blt.evaluate import evaluation_line
    from blt.flops import summary

    overrides = list(set_ or [])
    if data is not None:
        overrides.append(f"data.paths={json.dumps(data, ensure_ascii=False)}")
    if raw:
        overrides.append("data.raw=true")
    if entropies is not None:
        overrides.append(f"data.entropies={json.dumps(str(entropies), ensure_ascii=False)}")
    init_config = None
    if init is not None:
        from blt.language_model import model_folder
        from blt.model_files import read_model_config

        init_config = read_model_config(model_folder(init))
        overrides.append(f"init={json.dumps(init, ensure_ascii=False)}")
    if config is None:
        if init is None:
            raise ValueError("there is nothing to train: give a config, or a model to go on from (--init MODEL)")
        config = "finetune"
    run_config = _with_options(read_run_config(config, overrides, init_config), options)
    if dry_run:
        if options.json:
            print_json(run_config.model_dump(mode="json"))
            return
        print(to_toml(run_config))
        patch_bytes = run_config.model.patching.patch_bytes or run_config.calibration.target_patch_bytes
        print_flops(summary(run_config.model, patch_bytes, run_config.training.row_bytes))
        return
    run = out or (Path(config).parent if _is_of_a_run(Path(config)) else Path("runs") / Path(config).stem)
    if resume and not (run / "config.toml").is_file():
        raise FileNotFoundError(
            f"{run} holds no run to resume; leave out --resume, or name the run's folder with --out"
        )
    _, evaluation = _train(run_config, run, options, resume)
    if options.json:
        print_json(evaluation)
    else:
        print(f"held out, bits per byte: {evaluation_line(evaluation)}\nthe run is in {run}")


def _is_of_a_run(config: Path) -> bool:
    """Whether it is the config that a run keeps, and none that somebody named so."""
    beside = ("corpus/summary.json", "metrics.jsonl", "state", "model")
    return config.name == "config.toml" and any((config.parent / name).exists() for name in beside)


def entropies(
    model: str,
    *,
    data: Paths = None,
    raw: Annotated[bool, Parameter(negative=())] = False,
    out: Path,
    row_bytes: int | None = None,
    held_out_fraction: float | None = None,
    processes: int | None = None,
    device: str = "auto",
    options: Output = Output(),
) -> None:
    """Score a text once with a model's entropy model, for any number of trainings: blt train CONFIG --entropies OUT.

    Ctrl-C saves; the same command continues.

    Parameters
    ----------
    model
        A run folder, a folder in Hugging Face's blt or the official release format, or a hub id.
    data
        Files and folders, or stdlib. Default: what the run was trained on.
    raw
        Take every file as one document of bytes.
    out
        The folder for entropies, text and specification.
    row_bytes
        As in [training] of the runs to come. Default: the run's, else 512.
    held_out_fraction
        As in [data] of the runs to come. Default: the run's, else 0.03.
    processes
        How many score at once. Default: one for each CPU core.
    device
        auto, cpu, cuda or mps.
    """
    from blt.config import CorpusConfig, validated
    from blt.config_file import read_run_config
    from blt.entropy_scoring import score_corpus
    from blt.language_model import pick_device

    config_file = Path(model) / "config.toml"
    of_run = read_run_config(config_file) if config_file.is_file() else None
    if data is None and of_run is None:
        raise ValueError(f"{model} is no run with a text of its own; give one with --data")
    values = of_run.data.model_dump(exclude={"entropies"}) if of_run else {}
    if data is not None:
        values |= {"paths": tuple(data), "raw": raw}
    if held_out_fraction is not None:
        values["held_out_fraction"] = held_out_fraction
    corpus_config = validated(CorpusConfig, values, "command line")
    if row_bytes is None:
        row_bytes = of_run.training.row_bytes if of_run else 512
    target = pick_device(device)
    if processes is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = cores if target.type == "cpu" else 1
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    with reporter_for(options) as reporter:
        figures = score_corpus(model, corpus_config, out, row_bytes, processes, target, reporter)
    if options.json:
        print_json(figures)
    else:
        speed = f", {figures['bytes_per_second'] / 1e3:.1f} kB/s" if figures["bytes_per_second"] else ""
        print(f"{figures['bytes'] / 1e6:.2f} MB in {figures['rows']:,} rows{speed}\nthe entropies are in {out}")


def _with_options(config: "RunConfig", options: Options) -> "RunConfig":
    """The config with --seed and --dtype, where they are given."""
    if options.dtype != "auto":
        config = config.with_training(dtype=options.dtype)
    return config if options.seed is None else config.with_training(seed=options.seed)


def _train(config: "RunConfig", run: Path, options: Options, resume: bool) -> tuple["LanguageModel", dict[str, Any]]:
    from blt.language_model import pick_device
    from blt.train import train_and_report

    with reporter_for(options) as reporter:
        return train_and_report(config, run, pick_device(options.device), resume, reporter)

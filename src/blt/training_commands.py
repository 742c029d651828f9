"""The commands that make a model: ``blt demo``, ``blt train``."""

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from blt.command_options import Options, Paths, print_flops, print_json, reporter_for

if TYPE_CHECKING:
    from blt.config import RunConfig
    from blt.language_model import LanguageModel


def demo(*, out: Path = Path("runs/demo"), options: Options = Options()) -> None:
    """The main job at small scale: trains on Python's own library, evaluates, writes text, draws the picture.

    A demo that was interrupted goes on where it stopped.
    """
    from blt.config import read_run_config
    from blt.evaluate import evaluation_line
    from blt.report import patched_text, terminal_lines

    config = _with_options(read_run_config("demo"), options)
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
    config: str,
    *,
    data: Paths = None,
    raw: Annotated[bool, Parameter(negative=())] = False,
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    options: Options = Options(),
) -> None:
    """Train an entropy model (unless one is given), calibrate the threshold, train the network.

    Ctrl-C saves; --resume continues, on a CPU to the bit.

    Parameters
    ----------
    config
        A .toml file or the name of a preset: demo, tiny, small, blt_1b, blt_8b.
    data
        Files and folders to train on, or stdlib; instead of the config's.
    raw
        Take every file as one document of bytes.
    out
        The run folder; default runs/NAME.
    resume
        Go on with the run in the folder.
    set_
        Override a config value, as in --set model.latent.num_layers=4; may be repeated.
    dry_run
        Show the resolved config, parameters and FLOPs, and train nothing.
    """
    from blt.config import read_run_config, to_toml
    from blt.evaluate import evaluation_line
    from blt.flops import summary

    overrides = list(set_ or [])
    if data is not None:
        overrides.append(f"data.paths={json.dumps(data, ensure_ascii=False)}")
    if raw:
        overrides.append("data.raw=true")
    run_config = _with_options(read_run_config(config, overrides), options)
    if dry_run:
        if options.json:
            print_json(run_config.model_dump(mode="json"))
            return
        print(to_toml(run_config))
        patch_bytes = run_config.model.patching.patch_bytes or run_config.calibration.target_patch_bytes
        print_flops(summary(run_config.model, patch_bytes, run_config.training.row_bytes))
        return
    own_folder = Path(config).parent if Path(config).name == "config.toml" else None  # a run's own config
    run = out or own_folder or Path("runs") / Path(config).stem
    if resume and not (run / "config.toml").is_file():
        raise FileNotFoundError(
            f"{run} holds no run to resume; leave out --resume, or name the run's folder with --out"
        )
    _, evaluation = _train(run_config, run, options, resume)
    if options.json:
        print_json(evaluation)
    else:
        print(f"held out, bits per byte: {evaluation_line(evaluation)}\nthe run is in {run}")


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

"""The command ``blt``: one subcommand per job. Results go to stdout, progress and errors to stderr."""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from blt import __version__

if TYPE_CHECKING:
    from blt.config import RunConfig
    from blt.language_model import LanguageModel

FAILED, USAGE, INTERRUPTED = 1, 2, 130
FROM_STDIN = "\0-"  # what main makes of a lone hyphen, which cyclopts takes for an option; no argument can hold a NUL

app = App(name="blt", help="Byte Latent Transformers: train, measure, run.", version=__version__)


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """Options of every command."""

    json: Annotated[bool, Parameter(negative=())] = False
    "Print one JSON object on stdout and nothing else there."
    quiet: Annotated[bool, Parameter(negative=())] = False
    "No progress."
    debug: Annotated[bool, Parameter(negative=())] = False
    "Show the traceback of an error."


@Parameter(name="*")
@dataclass(frozen=True)
class Options(Output):
    """Options of every command that runs a model."""

    device: str = "auto"
    "auto, cpu, cuda or mps."
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    "Of weights (int8: rounded, to generate), or of products in training. auto: bfloat16 on CUDA, measured in training."
    seed: int | None = None
    "Of everything that is drawn at random; default: the config's, else 0."


EntropyKind = Annotated[Literal["transformer", "ngram"], Parameter(help="A network, or n-gram counts.")]
Paths = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]


@app.command
def doctor(*, options: Output = Output()) -> None:
    """What this machine offers, what is missing, and how to get it."""
    from blt.doctor import checks

    found = checks()
    if options.json:
        _print_json({check.name: {"found": check.found, "fix": check.fix} for check in found})
        return
    width = max(len(check.name) for check in found)
    for check in found:
        print(f"{check.name:{width}}  {check.found}" + (f"   -> {check.fix}" if check.fix else ""))


@app.command
def demo(
    *, out: Path = Path("runs/demo"), entropy_model: EntropyKind = "transformer", options: Options = Options()
) -> None:
    """The main job at small scale: trains on Python's own library, evaluates, writes text, draws the picture.

    A demo that was interrupted goes on where it stopped.
    """
    from blt.config import read_run_config
    from blt.evaluate import evaluation_line
    from blt.report import patched_text, terminal_lines

    counted = ['model.entropy_model={kind="ngram"}', "entropy_training=none"]
    config = _with_options(read_run_config("demo", counted if entropy_model == "ngram" else ()), options)
    lm, evaluation = _train(config, out, options, resume=True)
    prompt = b"def read_lines(path):\n"
    sample = prompt + b"".join(lm.stream(prompt, 200, temperature=0.9, seed=options.seed or 0))
    text = "import os\n\ndef home():\n    return os.path.expanduser('~')\n"
    if options.json:
        _print_json(evaluation | {"sample": sample.decode("utf-8", "replace")})
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


@app.command
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
            _print_json(run_config.model_dump(mode="json"))
            return
        print(to_toml(run_config))
        patch_bytes = run_config.model.patching.patch_bytes or run_config.calibration.target_patch_bytes
        _print_flops(summary(run_config.model, patch_bytes, run_config.training.row_bytes))
        return
    own_folder = Path(config).parent if Path(config).name == "config.toml" else None  # a run's own config
    run = out or own_folder or Path("runs") / Path(config).stem
    if resume and not (run / "config.toml").is_file():
        raise FileNotFoundError(
            f"{run} holds no run to resume; leave out --resume, or name the run's folder with --out"
        )
    _, evaluation = _train(run_config, run, options, resume)
    if options.json:
        _print_json(evaluation)
    else:
        print(f"held out, bits per byte: {evaluation_line(evaluation)}\nthe run is in {run}")


@app.command
def evaluate(
    model: str,
    *,
    data: Paths = None,
    raw: Annotated[bool, Parameter(negative=())] = False,
    window_bytes: int | None = None,
    options: Options = Options(),
) -> None:
    """Bits per byte over whole files, patch statistics, and gzip -9 and xz -9e on the same bytes.

    Parameters
    ----------
    model
        A run folder, a folder in Hugging Face's blt format, or a hub id.
    data
        Files and folders, or stdlib. Default: the documents that the run held out.
    raw
        Take every file as one document of bytes.
    window_bytes
        Length of the overlapping windows; default: the rows the run trained on, else at most 4096.
    """
    from blt import corpus
    from blt.evaluate import evaluate_inputs, evaluation_line
    from blt.progress import Reporter

    if window_bytes is not None and window_bytes < 2:
        raise ValueError(f"window_bytes must be at least 2, BOS and a byte, got {window_bytes}")
    lm = _load(model, options)
    if data is None:
        if not (Path(model) / "corpus").is_dir():
            raise ValueError(f"{model} has no held-out documents of its own; give some with --data")
        shard = corpus.open_shard(Path(model) / "corpus", "held_out")
        inputs = {"held out": list(shard.documents())}
    else:
        inputs = {path: [document.data for document in corpus.read_documents([path], raw)] for path in data}
    window = min(window_bytes or _trained_row_bytes(model) or 4096, lm.config.max_bytes)
    with Reporter(options.quiet) as reporter:
        figures = evaluate_inputs(lm.predict, inputs, window, lm.device, reporter)
    if options.json:
        _print_json(figures)
        return
    for name, of_input in figures["files"].items():
        print(f"{name}: {of_input['bytes']:,} bytes, {evaluation_line(of_input)}")
    if figures["empty_documents_skipped"]:
        print(f"{figures['empty_documents_skipped']} empty documents skipped")
    if len(figures["files"]) > 1:
        print(f"all: {figures['bytes']:,} bytes, {evaluation_line(figures)}")


@app.command
def generate(
    model: str,
    prompt: str = "",
    *,
    max_bytes: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Annotated[list[str] | None, Parameter(negative=())] = None,
    utf8: Annotated[bool, Parameter(negative=())] = False,
    speculate: int = 0,
    compile_: Annotated[bool, Parameter(name="--compile", negative=())] = False,
    raw: Annotated[bool, Parameter(negative=())] = False,
    stats: Annotated[bool, Parameter(negative=())] = False,
    options: Options = Options(),
) -> None:
    """Stream what a model writes after a prompt.

    Parameters
    ----------
    prompt
        The text to continue; - reads it from stdin.
    max_bytes
        At most this many new bytes.
    temperature
        0 takes the most probable byte each time.
    top_k
        Draw only from the k most probable bytes.
    top_p
        Draw only from the most probable bytes that together reach this probability.
    min_p
        Draw only from bytes at least this fraction as probable as the most probable.
    stop
        End before this text; may be repeated.
    utf8
        Never leave well-formed UTF-8.
    speculate
        Draft up to so many bytes at a time and verify them in one pass: the same text for greedy decoding.
    compile_
        Compile the steps: a minute at first, then about twice as fast.
    raw
        Write bytes as they are; without it, what is no UTF-8 shows as �.
    stats
        Say at the end, on stderr, what it cost.
    """
    from blt.generate import GenerationStats

    lm = _load(model, options)
    data = sys.stdin.buffer.read() if prompt == FROM_STDIN else prompt
    if len(data) > 20_000 and not options.quiet:
        print(f"reading a prompt of {len(data):,} bytes", file=sys.stderr)
    if compile_ and not options.quiet:
        print("compiling: a minute or two the first time, seconds from then on", file=sys.stderr)
    written, costs, started = bytearray(), GenerationStats(), time.perf_counter()
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "utf8": utf8,
    }
    sampling |= {"seed": options.seed or 0, "stop": ["-" if word == FROM_STDIN else word for word in stop or ()]}
    pieces = lm.stream(data, max_bytes, speculate=speculate, compiled=compile_, stats=costs, **sampling)
    for piece in pieces:
        written += piece
        if not options.json:
            sys.stdout.buffer.write(piece if raw else piece.decode("utf-8", "replace").encode())
            sys.stdout.buffer.flush()
    seconds = time.perf_counter() - started
    if options.json:
        figures = {"text": written.decode("utf-8", "replace"), "bytes": written.hex(), "new_bytes": len(written)}
        figures |= {"seconds": seconds, "bytes_per_second": len(written) / seconds, "latent_calls": costs.latent_calls}
        if speculate:
            figures |= {"accepted_bytes": costs.accepted_bytes, "drafted_bytes": costs.drafted_bytes}
        _print_json(figures)
    elif not raw:
        print()
    if stats:
        print(f"{len(written)} bytes in {seconds:.2f} s, {costs.summary(len(written), seconds)}", file=sys.stderr)


@app.command
def patch(
    model: str,
    text: Annotated[str, Parameter(show_default=False)] = FROM_STDIN,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    options: Options = Options(),
) -> None:
    """Show how a model cuts a text: entropies under the bytes, | where patches start.

    Parameters
    ----------
    text
        The text; - (the default) reads it from stdin.
    output
        Write a picture instead: .svg, .png, .html or .json.
    """
    from blt.report import patched_text, save_picture, terminal_lines

    data: str | bytes = sys.stdin.buffer.read() if text == FROM_STDIN else text
    if not data:
        raise ValueError("there is no text to patch; give some, or - to read it from stdin")
    patched = patched_text(_load(model, options), data)
    if output is not None:
        save_picture(patched, output)
    if options.json:
        _print_json(patched.as_json())
    elif output is None:
        print("\n".join(terminal_lines(patched, shutil.get_terminal_size().columns)))
        print(f"\n{len(patched.data)} bytes, {len(patched.patches)} patches of {patched.mean_patch_bytes:.2f} bytes")


@app.command
def flops(
    config: str,
    *,
    patch_bytes: float | None = None,
    context_bytes: int | None = None,
    options: Output = Output(),
) -> None:
    """Parameters, FLOPs per byte by part (the paper's eq. 13-17, and the entropy model), memory.

    Parameters
    ----------
    config
        A .toml file, a preset's name, or a model.
    patch_bytes
        Mean bytes per patch; default: the rule's own where it is fixed, else 4.5.
    context_bytes
        Length of the text; default: all that the model can hold.
    """
    from blt.config import preset_names, read_run_config
    from blt.flops import summary

    if Path(config).is_file() or config in preset_names() or config.endswith(".toml"):
        model_config = read_run_config(config).model
    else:
        from blt.huggingface import read_model_config
        from blt.language_model import model_folder

        model_config = read_model_config(model_folder(config))
    context = context_bytes or model_config.max_bytes
    counted = summary(model_config, patch_bytes or model_config.patching.patch_bytes or 4.5, context)
    if options.json:
        _print_json(counted)
    else:
        _print_flops(counted)


def main() -> None:
    """Run the command line; errors are one message and an exit code, not a traceback."""
    arguments = sys.argv[1:]
    try:
        given = [FROM_STDIN if argument == "-" else argument for argument in arguments]
        app(given, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        command = f"{arguments[0]} " if arguments and arguments[0] in app else ""
        _fail(f"{error}\nSee blt {command}--help", USAGE)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(FAILED)
    except (ValueError, OSError, MemoryError) as error:
        if "--debug" in arguments:
            raise
        _fail(_message(error), FAILED)
    except Exception as error:
        if "--debug" in arguments:
            raise
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which --help must not wait for
            _fail("out of memory; lower rows_per_step, raise micro_batches, or use --device cpu", FAILED)
        _fail(f"unexpected {type(error).__name__}: {error}\nRun again with --debug for the traceback", FAILED)


def _with_options(config: "RunConfig", options: Options) -> "RunConfig":
    """The config with --seed and --dtype, where they are given."""
    if options.dtype != "auto":
        config = config.with_training(dtype=options.dtype)
    return config if options.seed is None else config.with_training(seed=options.seed)


def _train(config: "RunConfig", run: Path, options: Options, resume: bool) -> tuple["LanguageModel", dict[str, Any]]:
    from blt.language_model import pick_device
    from blt.progress import Reporter
    from blt.train import train_and_report

    with Reporter(options.quiet) as reporter:
        return train_and_report(config, run, pick_device(options.device), resume, reporter)


def _load(model: str, options: Options) -> "LanguageModel":
    from blt.language_model import load

    return load(model, device=options.device, dtype=options.dtype)


def _trained_row_bytes(model: str) -> int | None:
    """The length of the rows a run was trained on; None for a model that is no run here."""
    from blt.config import read_run_config

    config_file = Path(model) / "config.toml"
    return read_run_config(config_file).training.row_bytes if config_file.is_file() else None


def _print_flops(counted: dict[str, Any]) -> None:
    from rich.console import Console

    from blt.flops import tables

    console = Console()
    for table in tables(counted):
        console.print(table)


def _print_json(figures: dict[str, Any]) -> None:
    print(json.dumps(figures))


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error) or type(error).__name__


def _fail(message: str, code: int) -> None:
    print(f"blt: {message.replace(FROM_STDIN, '-')}", file=sys.stderr)
    sys.exit(code)

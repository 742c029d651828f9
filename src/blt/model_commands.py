"""The commands that use a model: ``blt evaluate``, ``generate``, ``patch``, ``convert``, ``flops``; and ``blt doctor``."""

import math
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from blt.command_options import FROM_STDIN, Options, Output, Paths, print_flops, print_json, print_tasks, reporter_for

if TYPE_CHECKING:
    from blt.language_model import LanguageModel
    from blt.progress import Reporter

SECONDS_PER_REPORT = 3.0


def evaluate(
    model: str,
    *,
    data: Paths = None,
    raw: Annotated[bool, Parameter(negative=())] = False,
    window_bytes: int | None = None,
    tasks: Paths = None,
    task_data: Path | None = None,
    include_path: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    options: Options = Options(),
) -> None:
    """Bits per byte over whole files, patch statistics, and gzip -9 and xz -9e on the same bytes; tasks of lm-eval.

    Parameters
    ----------
    model
        A run folder, a folder in Hugging Face's blt format or the official release format, a hub id, or builtin, the small
        model that comes with the package.
    data
        Files and folders, or stdlib. Default: the documents that the run held out, unless there are tasks.
    raw
        Take every file as one document of bytes.
    window_bytes
        Length of the overlapping windows; default: the rows the run trained on, else at most 4096.
    tasks
        lm-eval's tasks and groups, YAML files of such, or ours: cute, hellaswag_noised, g2p, ... (docs/design.md).
    task_data
        Where our tasks find their benchmark's files: a folder, an archive, a file.
    include_path
        A folder with YAML files of more tasks.
    few_shot
        How many solved examples stand before each question; default: as the task says.
    limit
        Only so many documents of each task.
    """
    from blt.evaluate import evaluation_line
    from blt.processor import multiply_fast_in_fp32

    if window_bytes is not None and window_bytes < 2:
        raise ValueError(f"window_bytes must be at least 2, BOS and a byte, got {window_bytes}")
    if not tasks and (few_shot is not None or limit is not None or task_data is not None or include_path is not None):
        raise ValueError("few_shot, limit, task_data and include_path are about tasks; name some with --tasks")
    if raw and data is None:
        raise ValueError("raw is about files; name some with --data")
    if tasks:  # before anything is scored: what is missing is said at once
        try:
            from blt.harness import HarnessModel, evaluate_loaded, load_tasks
        except ImportError as error:
            raise ValueError(f"tasks need lm-eval ({error}): pip install 'blt-lm[eval]' -c constraints.txt") from None
    multiply_fast_in_fp32()
    lm = _load(model, options)
    window = min(window_bytes or _trained_row_bytes(model) or 4096, lm.config.max_bytes)
    figures: dict[str, Any] = {}
    with reporter_for(options) as reporter:
        loaded = load_tasks(tasks, reporter, task_data, include_path, few_shot, limit) if tasks else {}
        if data is not None or not tasks:
            figures = _bits_per_byte(lm, model, data, raw, window, reporter)
        if tasks:
            figures["tasks"] = evaluate_loaded(HarnessModel(lm, window, reporter, options.seed or 0), loaded, limit)
    if options.json:
        print_json(figures)
        return
    for name, of_input in figures.get("files", {}).items():
        print(f"{name}: {of_input['bytes']:,} bytes, {evaluation_line(of_input)}")
    if figures.get("empty_documents_skipped"):
        print(f"{figures['empty_documents_skipped']} empty documents skipped")
    if len(figures.get("files", {})) > 1:
        print(f"all: {figures['bytes']:,} bytes, {evaluation_line(figures)}")
    if tasks:
        print_tasks(figures["tasks"])


def _bits_per_byte(
    lm: "LanguageModel", model: str, data: list[str] | None, raw: bool, window: int, reporter: "Reporter"
) -> dict[str, Any]:
    """What the model makes of the given inputs, or of what its run held out."""
    from blt import corpus
    from blt.documents import read_documents
    from blt.evaluate import evaluate_inputs

    if data is not None:
        inputs = {path: list(read_documents([path], raw)) for path in data}
    elif (Path(model) / "corpus").is_dir():
        shard = corpus.open_shard(Path(model) / "corpus", "held_out")
        inputs = {"held out": list(shard.documents())}
    else:
        raise ValueError(f"{model} has no held-out documents of its own; give some with --data")
    return evaluate_inputs(lm.predict, inputs, window, lm.device, reporter)


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
    model
        As for blt evaluate: builtin, the small model that comes with the package, a run folder, ...
    prompt
        The text to continue; - reads it from stdin, also one that begins with a hyphen.
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
        Never leave well-formed UTF-8; at the limit of bytes no character is begun.
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

    if temperature == 0 and (top_k or min_p or top_p not in (None, 1)):
        raise ValueError("top_k, top_p and min_p are about drawn bytes; give a --temperature above 0, such as 1")
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
        print_json(figures)
    elif not raw:
        print()
    if stats:
        print(f"{len(written)} bytes in {seconds:.2f} s, {costs.summary(len(written), seconds)}", file=sys.stderr)


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
    model
        As for blt evaluate: builtin, the small model that comes with the package, a run folder, ...
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
        print_json(patched.as_json())
    elif output is None:
        print("\n".join(terminal_lines(patched, shutil.get_terminal_size().columns)))
        print(f"\n{len(patched.data)} bytes, {len(patched.patches)} patches of {patched.mean_patch_bytes:.2f} bytes")


def convert(
    source: str,
    dest: Annotated[Path | None, Parameter(show_default=False)] = None,
    *,
    to: Literal["hf", "official"] = "hf",
    from_token_model: Path | None = None,
    config: str | None = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    options: Output = Output(),
) -> None:
    """Write a model in another format, its weights to the bit, one tensor at a time. Or begin a BLT from a token model.

    blt convert SOURCE DEST; blt convert --from-token-model FOLDER --config CONFIG DEST, then blt train DEST/train.toml.

    Parameters
    ----------
    source
        A run folder, a folder in Hugging Face's blt format or the official release format, or a hub id. With
        --from-token-model: the new folder.
    dest
        A new folder.
    to
        hf: what transformers loads. official: the files of facebook/blt-1b.
    from_token_model
        A folder with a model in Llama's format: its layers become the latent transformer, all else is fresh.
    config
        With --from-token-model: a .toml file or a preset that says what the local parts are and how to train.
    set_
        With --from-token-model: override a config value, as in blt train.
    """
    if from_token_model is not None:
        if dest is not None or config is None or to != "hf":
            raise ValueError("--from-token-model wants one folder to write to, and a --config: blt convert --help")
        _begin_from_token_model(from_token_model, config, list(set_ or []), Path(source), options)
        return
    if dest is None or config is not None or set_:
        raise ValueError("a conversion wants SOURCE and DEST, and no --config: blt convert --help")
    from blt.language_model import model_folder_and_card
    from blt.model_files import convert as convert_folder

    folder, card = model_folder_and_card(source)
    started = shown = time.perf_counter()
    with reporter_for(options) as reporter:

        def show(done: int, total: int) -> None:
            nonlocal shown
            if (now := time.perf_counter()) - shown > SECONDS_PER_REPORT:
                shown, seconds = now, now - started
                rate = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB  {done / 1e6 / seconds:.0f} MB/s"
                reporter.show("converting", done, total, rate)

        num_bytes = convert_folder(folder, dest, to, card, show)
    seconds = time.perf_counter() - started
    if options.json:
        print_json({"folder": str(dest), "format": to, "weight_bytes": num_bytes, "seconds": seconds})
    else:
        print(f"{dest}: {num_bytes / 1e6:,.1f} MB of weights in {seconds:.1f} s")


def _begin_from_token_model(folder: Path, config: str, overrides: list[str], dest: Path, options: Output) -> None:
    from blt.config_file import read_run_config
    from blt.language_model import card_of
    from blt.token_model import RUN_FILE, convert_token_model

    made = convert_token_model(folder, read_run_config(config, overrides), dest, card_of(folder, str(folder)))
    latent, run_file = made.model.latent, dest / RUN_FILE
    if options.json:
        print_json({"folder": str(dest), "config": str(run_file), "latent": latent.model_dump(mode="json")})
    else:
        print(
            f"{dest}: {latent.num_layers} latent layers of width {latent.width} from {folder}, all else fresh\n"
            f"Next: blt train {run_file} --out RUN"
        )


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
    from blt.config_file import preset_names, read_run_config
    from blt.flops import summary

    if patch_bytes is not None and not 1 <= patch_bytes < math.inf:
        raise ValueError(f"patch_bytes must be at least 1 and finite, got {patch_bytes:g}")
    if context_bytes is not None and context_bytes < 1:
        raise ValueError(f"context_bytes must be at least 1, got {context_bytes}")
    if Path(config).is_file() or config in preset_names() or config.endswith(".toml"):
        model_config = read_run_config(config).model
    else:
        from blt.language_model import model_folder
        from blt.model_files import read_model_config

        model_config = read_model_config(model_folder(config))
    context = context_bytes or model_config.max_bytes
    counted = summary(model_config, patch_bytes or model_config.patching.patch_bytes or 4.5, context)
    if options.json:
        print_json(counted)
    else:
        print_flops(counted)


def doctor(*, options: Output = Output()) -> None:
    """What this machine offers, what is missing, and how to get it."""
    from blt.doctor import checks

    found = checks()
    if options.json:
        print_json({check.name: {"found": check.found, "fix": check.fix} for check in found})
        return
    width = max(len(check.name) for check in found)
    for check in found:
        print(f"{check.name:{width}}  {check.found}" + (f"   -> {check.fix}" if check.fix else ""))


def _load(model: str, options: Options) -> "LanguageModel":
    from blt.language_model import load

    return load(model, device=options.device, dtype=options.dtype)


def _trained_row_bytes(model: str) -> int | None:
    """The length of the rows a run was trained on; None for a model that is no run here."""
    from blt.config_file import read_run_config

    config_file = Path(model) / "config.toml"
    return read_run_config(config_file).training.row_bytes if config_file.is_file() else None

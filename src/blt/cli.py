"""The command ``blt``: one subcommand per job. Results go to stdout, progress and errors to stderr."""

import sys

from cyclopts import App, CycloptsError

from blt import __version__, model_commands, training_commands
from blt.command_options import FROM_STDIN

FAILED, USAGE, INTERRUPTED = 1, 2, 130

app = App(name="blt", help="Byte Latent Transformers: train, measure, run.", version=__version__)
for command in (
    *(training_commands.demo, training_commands.train, training_commands.entropies),
    *(model_commands.evaluate, model_commands.generate, model_commands.patch),
    *(model_commands.convert, model_commands.flops, model_commands.doctor),
):
    app.command(command)


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


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error) or type(error).__name__


def _fail(message: str, code: int) -> None:
    print(f"blt: {message.replace(FROM_STDIN, '-')}", file=sys.stderr)
    sys.exit(code)

"""What a person sees of a long job, on stderr: one live line on a terminal, one plain line per report elsewhere."""

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Says lines and shows how far a job is. Quiet: neither. Use it as a context."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.live = self.console.is_terminal and not quiet
        self.bars = Progress(*columns, console=self.console, transient=True, disable=not self.live)
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> "Reporter":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, line: str) -> None:
        """One line that stays."""
        if self.live:
            self.bars.console.print(line, markup=False)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def show(self, job: str, done: int, total: int, figures: str) -> None:
        """How far ``job`` is, with its latest figures; a terminal also shows the time left."""
        if job not in self._tasks:
            self._tasks[job] = self.bars.add_task(job, total=total, completed=done, figures="")
        self.bars.update(self._tasks[job], completed=done, figures=figures)  # type: ignore[arg-type]
        if not self.live:
            self.say(f"{job} {100 * done // total:3d}%  {figures}")
        if done >= total:
            self.bars.remove_task(self._tasks.pop(job))  # type: ignore[arg-type]

"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Report:
    """Messages and progress of a run of `steps` steps; a context manager."""

    def __init__(self, steps: int, start: int = 0):
        self._console = Console(soft_wrap=True, highlight=False, emoji=False)
        self._steps = steps
        self._bar = None
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=steps, completed=start)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Prints a line that stays."""
        self._console.print(message, markup=False)

    def advance(self, step: int, line: str) -> None:
        """Shows that `step` steps are done, and `line`."""
        if self._bar is None:
            self.say(f"step {step}/{self._steps}  {line}")
        else:
            self.show(step, line)

    def show(self, step: int, line: str) -> None:
        """As `advance`, but on a terminal's bar only."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=line)

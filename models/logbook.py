"""What a run tells: a bar or plain lines for people, log.jsonl for programs, TensorBoard if asked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nestloop.errors import MissingPackageError


class Logbook:
    """The log of one run; silent on processes that are not the main one.

    log.jsonl holds a record a line: kind ("step", "eval", "note", ...), step, time, and the kind's values. A
    continued run keeps the records up to the step it continues from and writes on.
    """

    def __init__(
        self,
        run_dir: Path,
        is_main: bool = True,
        total_steps: int = 0,
        step: int = 0,
        tensorboard: bool = False,
        console: Console | None = None,
    ) -> None:
        self.is_main = is_main
        self.records: list[dict[str, Any]] = []
        self.console = console or Console(stderr=False, highlight=False, soft_wrap=True)
        self._board: Any = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if not is_main:
            return
        path = run_dir / "log.jsonl"
        self.records = [record for record in read_log(run_dir) if record["step"] <= step] if path.exists() else []
        rewritten = path.with_suffix(".partial")
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        rewritten.replace(path)
        self._file = path.open("a", buffering=1)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingPackageError(
                    "--tensorboard needs tensorboard",
                    given="an environment without tensorboard",
                    need="tensorboard",
                    fix="pip install tensorboard -c constraints.txt",
                ) from error
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, TextColumn("{task.fields[latest]}"), console=self.console)
            self._task = self._progress.add_task("training", total=total_steps, completed=step, latest="")
            self._progress.start()

    def record(self, kind: str, step: int, line: str = "", **values: Any) -> None:
        """Writes one record; `line` is what people see of it."""
        if not self.is_main:
            return
        entry = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self.records.append(entry)
        self._file.write(json.dumps(entry) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
        if kind == "step" and self._progress is not None:
            self._progress.update(self._task, latest=line)
        elif line:
            self.console.print(line, markup=False)

    def advance(self, step: int, epoch: int, epochs: int) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=f"epoch {epoch + 1}/{epochs}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self.is_main:
            self._file.close()


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl; a last line that a kill cut short is left out."""
    records = []
    for line in (run_dir / "log.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records

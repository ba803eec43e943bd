"""Progress as bars on a terminal and as lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from treemem.types import Progress

LINE_SECONDS = 15.0
"""How often a line is printed where there is no terminal."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "", style="dim")


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = f" of about {task.total:,.0f}" if task.total else ""
        return Text(f"{task.completed:,.0f}{total}")


def _name(stage: str) -> str:
    """A stage without the figures that stand behind a comma: these change, the stage is the same."""
    return stage.partition(",")[0]


@contextmanager
def bars(console: Console) -> Iterator[Progress]:
    """A function that shows how far each stage has come, with its rate and the time left."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        TextColumn("{task.description:<18}"), BarColumn(), _Count(), _Rate(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=console, transient=True) as shown:
        tasks: dict[str, Task] = {}

        def report(stage: str, done: float, total: float | None) -> None:
            name = _name(stage)
            if name not in tasks:
                shown.add_task(stage, total=total)
                tasks[name] = shown.tasks[-1]
            tasks[name].total = total  # `update` would forget the rate whenever the total changes
            shown.update(tasks[name].id, completed=done, description=stage)

        yield report


def _lines(console: Console) -> Progress:
    began: dict[str, float] = {}
    last = 0.0

    def report(stage: str, done: float, total: float | None) -> None:
        nonlocal last
        now, name = time.monotonic(), _name(stage)
        new = name not in began
        began.setdefault(name, now)
        if not new and now - last < LINE_SECONDS:
            return
        last = now
        rate = done / (now - began[name]) if now > began[name] else 0.0
        left = f", {(total - done) / rate:,.0f} s left" if total and rate else ""
        count = f" {done:,.0f}" + (f" of about {total:,.0f}" if total else "") if done else ""
        console.print(f"{stage}{count}" + (f", {rate:,.0f}/s{left}" if done and rate else ""), highlight=False)

    return report

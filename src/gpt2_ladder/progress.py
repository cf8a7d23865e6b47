"""What the user sees of a training: a live line on a terminal, a plain line now and then in a log file."""

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpt2_ladder.metrics import Step

LOG_EVERY = 10


def show(steps: Iterable[Step], title: str, total: int) -> Iterator[Step]:
    """Pass `steps` through unchanged and show step, loss, tokens/s and the time left of `total` steps."""
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    elapsed_ms = 0.0
    # drawn between steps only: a thread that redraws would take its time from the step that is being measured
    with Progress(*columns, console=console, disable=not console.is_terminal, auto_refresh=False) as bar:
        task = bar.add_task(title, total=total, values="first step ...")
        for step in steps:
            elapsed_ms += step.step_ms
            values = f"loss {step.loss:7.4f}  {step.tokens_per_second:8,.0f} tokens/s"
            bar.update(task, advance=1, values=values, refresh=True)
            if bar.disable and (step.step % LOG_EVERY == 0 or step.step == total - 1):
                left_s = elapsed_ms / 1000 / (step.step + 1) * (total - step.step - 1)
                print(f"{title:8}  step {step.step:3}/{total}  {values}  {left_s:4.0f} s left", flush=True)
            yield step

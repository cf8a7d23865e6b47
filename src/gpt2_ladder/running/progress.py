"""Show the progress of a training: a live line on a terminal, plain lines in a log file."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from gpt2_ladder.training.metrics import Step

LOG_LINES = 10  # in a log file, about this many per training


def show(steps: Iterable[Step], title: str, count: Callable[[], int | None]) -> Iterator[Step]:
    """Yield `steps` and show their progress. `count` returns the number of all steps; None: it is not known yet."""
    console = Console()
    bar_columns = BarColumn(bar_width=20), MofNCompleteColumn()
    columns = "{task.description}", *bar_columns, "{task.fields[values]} left", TimeRemainingColumn()
    last_ms = deque[float](maxlen=20)
    # drawn only between steps: a thread that redraws the bar would slow down the step that is being timed
    with Progress(*columns, console=console, disable=not console.is_terminal, auto_refresh=False) as bar:
        task = bar.add_task(title, total=count(), values="first step ...")
        for step in steps:
            last_ms.append(step.step_ms)
            total = count()
            values = f"loss {step.loss:7.4f}  {step.tokens_per_second:8,.0f} tokens/s"
            bar.update(task, advance=1, total=total, values=values, refresh=True)
            if bar.disable and total and (step.step % max(1, total // LOG_LINES) == 0 or step.step == total - 1):
                # no estimate from the first step, which may include a compilation
                left = f"{median(last_ms) / 1000 * (total - step.step - 1):4.0f} s left" if step.step else ""
                print(f"{title:8}  step {step.step:3}/{total}  {values}  {left}", flush=True)
            yield step

"""`trainer.profile_steps`: runs torch's profiler around some optimizer steps of a launch."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.config.schema import UNTIMED_STEPS
from dstune.core import files
from dstune.protocols import callback
from dstune.protocols.callback import CONTINUE, Callback, Request, Run, Step

if TYPE_CHECKING:
    from torch.profiler import profile, record_function

FOLDER = "profile"
"""In the run directory."""

ROWS = 25
"""Operations in the table."""


@callback
class StepProfiler(Callback):
    """Records `trainer.profile_steps` steps of this launch. All ranks record the same steps: profiling slows a rank down, and
    ranks that did not record would wait for it.

    Evaluations and saves are not recorded: the recording ends before them, and a new trace begins after them.
    folder: of the run. message: prints a line; called only on rank 0.
    """

    name = "profiler"
    order = 70

    def __init__(self, steps: int, folder: Path, rank: int, message: Callable[[str], None]):

        from dstune.zero import accelerator

        self._steps_left, self._folder, self._rank, self._message = steps, folder / FOLDER, rank, message
        self._on_gpu = accelerator.present()
        self._recording: profile | None = None
        self._mark: record_function | None = None
        self._steps: list[int] = []
        self._done: profile | None = None
        """A recording that is not written yet."""
        self._written = self._waits = False

    @classmethod
    def for_run(cls, run: Any) -> StepProfiler:
        message = run.log.message if run.log else lambda text: None
        return cls(run.config.trainer.profile_steps, run.run_dir, run.world.rank, message)

    def on_step_begin(self, run: Run, step: Step) -> None:
        if step.number_in_launch >= UNTIMED_STEPS:
            self._before_step(step.number)
        if self.disturbs:
            step.timed = False

    def on_step_agreed(self, run: Run, step: Step) -> Request:
        # If the step has a request, an evaluation, save or the end comes next, not a step.
        self._after_step(pause=bool(step.request.action) or step.number >= run.total_steps)
        return CONTINUE

    def between_steps(self, run: Run) -> None:
        if self._done is not None:
            with run.around("writing the profile"):
                self.write()

    @property
    def disturbs(self) -> bool:
        """Whether this step is slowed down, by the recording or by waiting for a rank that still writes its trace."""
        return self._recording is not None or self._waits

    def _before_step(self, step: int) -> None:
        """Start recording the step with this number, which counts from 1."""
        self._waits, self._written = self._written, False
        if not self._steps_left:
            return
        from torch.profiler import ProfilerActivity, profile, record_function

        if self._recording is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
            self._steps = []
            self._recording = profile(activities=activities)
            if not self._survives(self._recording.start):
                return
        self._steps.append(step)
        self._mark = record_function(f"optimizer step {step}")
        self._mark.__enter__()

    def _after_step(self, *, pause: bool) -> None:
        """Finish a recorded step; stop recording if it was the last one. pause: no step follows immediately."""
        if self._recording is None or self._mark is None:
            return
        self._mark.__exit__(None, None, None)
        self._mark = None
        self._steps_left -= 1
        if pause or not self._steps_left:
            self._stop()

    def close(self) -> None:
        """Stop recording and write the trace, even if the run ends before all requested steps were recorded."""
        self._steps_left = 0
        self._stop()
        self.write()

    def _stop(self) -> None:
        recorded = self._recording
        if recorded is not None and self._survives(recorded.stop):
            self._recording, self._done = None, recorded

    def write(self) -> None:
        """Write the trace and the table of this rank's finished recording, if there is one."""
        recorded, self._done = self._done, None
        if recorded is not None:
            self._written = True
            self._survives(lambda: self._write(recorded))

    def _write(self, recorded: profile) -> None:
        first, last = self._steps[0], self._steps[-1]
        self._folder.mkdir(exist_ok=True)
        name = f"steps-{first}-{last}.rank-{self._rank}"
        temporary = self._folder / f"incomplete.{name}.{secrets.token_hex(8)}.json.gz"
        recorded.export_chrome_trace(str(temporary))
        temporary.replace(self._folder / f"{name}.json.gz")
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        table = as_table(recorded.key_averages(), f"{steps} of rank {self._rank}", on_gpu=self._on_gpu)
        files.write(self._folder / f"{name}.txt", table)
        if self._rank == 0:
            self._message(f"profile of {steps}: {self._folder} (tables, and traces for https://ui.perfetto.dev)")

    def _survives(self, action: Callable[[], object]) -> bool:
        """Run `action`; return whether it succeeded. If the profiler or the disk fails, the run loses its profile and nothing
        else."""
        try:
            action()
            return True
        except (OSError, RuntimeError) as error:
            self._steps_left, self._recording, self._mark = 0, None, None
            if self._rank == 0:
                self._message(f"warning: no profile: {error}")
            return False


def as_table(operations: Iterable[Any], title: str, *, on_gpu: bool) -> str:
    """Return the most expensive operations as a table: by the time of the GPU work that they start, or without a GPU by the CPU
    time that they take themselves.

    operations: torch's `FunctionEventAvg`, times in microseconds.
    """
    kind = "device" if on_gpu else "self CPU"
    rows = []
    for operation in operations:
        if operation.device_type.name == "CPU" and not getattr(operation, "is_user_annotation", False):
            spent = operation.self_device_time_total if on_gpu else operation.self_cpu_time_total
            rows.append((spent / 1e3, operation.count, operation.key))
    total = sum(spent for spent, _, _ in rows) or 1.0
    lines = [
        f"{title}: {total / 1e3:.3f} s of {kind} time",
        "",
        f"{f'{kind} ms':>12}{'share':>8}{'calls':>9}  operation",
    ]
    for spent, calls, name in sorted(rows, reverse=True)[:ROWS]:
        lines.append(f"{spent:>12.2f}{spent / total:>8.1%}{calls:>9}  {name}")
    return "\n".join(lines) + "\n"

"""A callback as a user writes one: with state, a veto, a change of gradients, numbers and requests."""

from __future__ import annotations

from dstune.protocols.callback import CONTINUE, Action, Callback, Request


class Meddler(Callback):
    """Vetoes one step on one rank, halves gradients after it, sums up losses, and lets one rank ask for a save."""

    name = "meddler"

    def __init__(self, vetoed: int, rank: int = 1):
        self.vetoed, self.rank = vetoed, rank
        self.batches = 0
        self.total = 0.0
        self.number = 0
        self.run_rank = 0
        self.slowest = 0.0
        self.loss = 0.0
        self.losses: list[float] = []

    def on_step_begin(self, run, step):
        self.number, self.run_rank = step.number, run.world.rank

    def on_micro_batch_end(self, run, step, position):
        self.batches += 1

    def veto(self, run, loss):
        return self.number == self.vetoed and self.run_rank == self.rank

    def before_update(self, partition, gradient, group):
        if self.number > self.vetoed:
            gradient.mul_(0.5)

    def numbers(self):
        batches, self.batches = self.batches, 0
        return {"batches": batches, "loss": self.loss}

    def agreed(self, run, numbers):
        self.slowest = max(numbers["batches"])
        self.losses = list(numbers["loss"])

    def on_step_end(self, run, step):
        self.loss = step.loss
        asks = step.number == 2 and run.world.rank == self.rank
        return Request(Action.SAVE) if asks else CONTINUE

    def on_step_agreed(self, run, step):
        self.total += step.loss
        return CONTINUE

    def metrics(self, run, step):
        seen = {f"meddler/loss_of_rank_{rank}": loss for rank, loss in enumerate(self.losses)}
        return {"meddler/total": self.total, "meddler/batches": self.slowest, **seen}

    def results(self):
        return {"meddler": self.total}

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]

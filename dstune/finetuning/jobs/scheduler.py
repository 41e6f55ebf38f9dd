"""Chooses which waiting jobs start: by priority, then the organization with the least usage for its weight, then age.

The choice is a pure function of the waiting jobs, the running jobs and the usage.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dstune.finetuning.jobs.presets import LOCAL, Limits, QueueSettings

DEFAULT_SECONDS = 600.0
"""Assumed duration of a job without a plan."""


@dataclass(frozen=True)
class Waiting:
    id: str
    number: int
    organization: str
    key: str
    priority: int = 0
    pool: str = LOCAL
    devices: int = 1
    """Devices that it takes if they are free."""
    fewest: int | None = None
    """Devices that are enough; None for all of them."""
    seconds: float = DEFAULT_SECONDS
    """Its expected duration."""


@dataclass(frozen=True)
class Busy:
    """A job that holds devices."""

    organization: str
    key: str
    pool: str
    taken: Sequence[int]
    charged: float
    """Device-seconds that it has used or is expected to use."""


@dataclass
class Shares:
    """Device-seconds by organization, of finished and running jobs."""

    used: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def of(self, organization: str, limits: Limits) -> float:
        return self.used[organization] / limits.weight


@dataclass
class _Room:
    """Free local devices, and free places in the queues of other pools."""

    free: list[int]
    places: int
    """The most jobs that each other pool may have at once."""
    submitted: Counter[str] = field(default_factory=Counter)
    blocked: set[str] = field(default_factory=set)
    """Pools without room for the job whose turn it was: later jobs wait too."""

    def occupied_by(self, job: Busy) -> None:
        if job.pool == LOCAL:
            self.free = [device for device in self.free if device not in job.taken]
        else:
            self.submitted[job.pool] += 1

    def take(self, job: Waiting) -> list[int] | None:
        """Return the devices for a job (none in another pool); None if it has to wait."""
        if job.pool in self.blocked:
            return None
        if job.pool != LOCAL:
            if self.submitted[job.pool] >= self.places:
                self.blocked.add(job.pool)
                return None
            self.submitted[job.pool] += 1
            return []
        if (job.devices if job.fewest is None else job.fewest) > len(self.free):
            self.blocked.add(LOCAL)
            return None
        taken, self.free = self.free[: job.devices], self.free[job.devices :]
        if not self.free:
            self.blocked.add(LOCAL)
        return taken


def choose(
    waiting: Iterable[Waiting], busy: Iterable[Busy], used: Mapping[str, float], settings: QueueSettings, devices: int
) -> list[tuple[Waiting, list[int]]]:
    """Return the jobs to start, with their devices, in order. used: device-seconds of finished jobs by organization; devices: the
    number of local devices. A job takes as many devices as it can use, down to its fewest. If it is a job's turn and too few are
    free, freed devices are reserved for it, so that smaller jobs cannot pass a large one for ever."""
    shares = Shares(defaultdict(float, used))
    room = _Room(list(range(devices)), settings.submitted)
    running: Counter[tuple[str, str]] = Counter()
    for job in busy:
        shares.used[job.organization] += job.charged
        running["organization", job.organization] += 1
        running["key", job.key] += 1
        room.occupied_by(job)
    queues: dict[tuple[int, str], list[Waiting]] = defaultdict(list)
    for candidate in sorted(waiting, key=lambda candidate: candidate.number, reverse=True):
        queues[candidate.priority, candidate.organization].append(
            candidate
        )  # oldest last, since jobs are popped from the end
    chosen: list[tuple[Waiting, list[int]]] = []
    while queues:
        priority, organization = min(
            queues, key=lambda key: (-key[0], shares.of(key[1], settings.of(key[1])), queues[key][-1].number)
        )
        queue = queues[priority, organization]
        candidate = queue.pop()
        if not queue:
            del queues[priority, organization]
        limits, key_limit = settings.of(organization), settings.key.running
        if limits.running is not None and running["organization", organization] >= limits.running:
            queues.pop((priority, organization), None)
            continue
        if key_limit is not None and running["key", candidate.key] >= key_limit:
            continue
        taken = room.take(candidate)
        if taken is None:
            continue
        shares.used[organization] += (len(taken) or candidate.devices) * candidate.seconds
        running["organization", organization] += 1
        running["key", candidate.key] += 1
        chosen.append((candidate, taken))
        if all(job.pool in room.blocked for queue_jobs in queues.values() for job in queue_jobs):
            break
    return chosen

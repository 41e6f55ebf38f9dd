"""The limits of everything that a stranger may have this machine compute, in one table."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Limits:
    """What one piece of work may take; 0: not limited."""

    seconds: float = 0.0
    """Processor time of one piece of work; of a judged program, wall-clock time."""
    added_bytes: int = 0
    """Memory of its process in addition to what the process has before."""
    memory_bytes: int = 0
    """Address space of each process; of a judged program, the memory of all its processes together too."""
    processes: int = 0
    """Processes and threads."""
    descriptors: int = 0
    """Open files, pipes and sockets of each process. The buffers of a socket hold about 200 KiB."""
    file_bytes: int = 0
    """Size of each file that it writes; of a judged program, of all files together, which are in memory."""
    files: int = 0
    """Number of files and folders of a judged program, which take memory of the kernel even if they are empty."""
    output_bytes: int = 0
    """Size of an answer, or of standard output."""
    is_filtered: bool = False
    """Whether the kernel refuses system calls that the work does not need, where it can."""


WALL = 20
"""Multiple of the processor time after which a child is ended even if it sleeps: the machine may have other things to do."""

TEMPLATE = Limits(seconds=1.5, added_bytes=2**30)
"""A chat template that renders a conversation; one of 1,000 messages takes about 50 ms."""
TEMPLATE_PROCESS = replace(TEMPLATE, descriptors=64, file_bytes=1, output_bytes=2**28, is_filtered=True)
"""The process that renders for the threads of a server."""
TEMPLATE_OPENING = Limits(seconds=0.8, added_bytes=2**30)
"""The conversations that show how a template writes, together: about 35 short ones, which take about 30 ms."""
TEMPLATE_TRIAL = Limits(seconds=1.0, added_bytes=2**30)
"""Three conversations that are rendered before a template is used; they take about 100 ms."""
TEMPLATE_PROOF = Limits(seconds=5.0, added_bytes=2**30)
"""A conversation that is rendered to prove what it trains; making its samples took less."""
TOKENIZER_TRIAL = Limits(seconds=1.9, added_bytes=2**30)
"""The patterns of a tokenizer, with texts that make slow ones slow."""
PATTERNS = Limits(seconds=1.9, added_bytes=2**30)
"""Patterns of an adapter, matched with the names of a model's modules."""
TABLE_PIECE = Limits(added_bytes=2**30)
"""A piece of a table of Parquet or Arrow that is unpacked."""
IMAGE = Limits(
    seconds=1.5, added_bytes=5 * 2**29, descriptors=64, file_bytes=1, output_bytes=2**28 + 2**10, is_filtered=True
)
"""An image that is decoded; it writes no file. The largest that are allowed, with transparency, take 2.1 GiB (PNG) and 2.4 GiB
(WEBP)."""
IMAGE_SECONDS_PER_PIXEL = 1e-7
"""Processor time in addition, by the pixels that the image says it has: 0.1 s for each million."""
REWARDS = Limits(memory_bytes=8 * 2**30, processes=256, file_bytes=2**24, output_bytes=2**28)
"""The rewards of a run. `task.reward_seconds` is their time, `file_bytes` also the limit of what they print. They start judged
programs, so that their system calls are not filtered."""
PROGRAM = Limits(
    seconds=120.0,
    memory_bytes=2 * 2**30,
    processes=16,
    descriptors=64,
    file_bytes=2**28,
    files=10_000,
    output_bytes=2**20,
    is_filtered=True,
)
"""A judged program. Graders in OpenAI's API have 120 s, 2 GB of memory and 1 GB of files."""

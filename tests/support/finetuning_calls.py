"""Running a test on a server of the fine-tuning API, and waiting for what its processes do."""

from __future__ import annotations

import asyncio
import time

from tests.support.finetuning import cloud


def run(test, tmp_path, **options):
    async def main():
        async with cloud(tmp_path, **options) as found:
            return await test(found)

    return asyncio.run(main())


async def until(check, seconds=60.0):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it does not come"
        await asyncio.sleep(0.02)

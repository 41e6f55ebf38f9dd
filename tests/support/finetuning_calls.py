"""Running a test on a server of the fine-tuning API, and waiting for what its processes do."""

from __future__ import annotations

import asyncio

from tests.support.finetuning import cloud
from tests.support.serving import until as until


def run(test, tmp_path, **options):
    async def main():
        async with cloud(tmp_path, **options) as opened:
            return await test(opened)

    return asyncio.run(main())

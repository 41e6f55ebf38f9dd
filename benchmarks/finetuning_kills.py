"""How a server of the fine-tuning API bears being killed: `python benchmarks/finetuning_kills.py [KILLS]` (200).

Clients create, cancel and upload by the official client, the server is killed by SIGKILL at random moments. Prints what was
lost, doubled or stuck, and what the checker finds; exits with 1 then.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.killing import run


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory(prefix="dstune-kills-") as folder:
        report = run(Path(folder), kills, seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())

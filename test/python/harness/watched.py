# SPDX-License-Identifier: MIT
"""One round trip by ranks that are threads of this process, for tools that watch a process.

python -m harness.watched BACKEND RANKS
"""

from __future__ import annotations

import sys
import tempfile
import threading
import traceback

from harness.cases import Case, Scales
from harness.programs import basics
from harness.worker import Context, Server

CASES = [
    Case("bf16", tokens=(9, 0, 14), hidden=129, bias=2, source="mixed"),
    Case("fp8", dtype="float8_e4m3fn", hidden=96, scales=Scales("float8_e8m0fnu", 3), worst="room"),
]


def main(backend: str, ranks: int) -> int:
    failed = []

    def run(server: Server, rank: int) -> None:
        try:
            context = Context(server, rank)
            for job, case in enumerate(CASES):
                context.run(job, basics.cached, (case, 7))
            context.close()
        except BaseException:
            traceback.print_exc()
            failed.append(rank)

    with tempfile.TemporaryDirectory() as scratch:
        place = {"scratch": scratch, "backend": backend, "mode": "thread", "size": ranks}
        server = Server(None, {**place, "ranks": list(range(ranks))})
        threads = [threading.Thread(target=run, args=(server, rank)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(f"{ranks} ranks, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

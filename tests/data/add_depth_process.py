"""A process that runs `add-depth`, a keyframe a chunk, and may die on its way: `DIE_AFTER ARGUMENT...`.

DIE_AFTER is how many chunks are written before the process is killed as by `kill -9`; -1 lets it live.
"""

import os
import signal
import sys
from typing import Any

import data_prep.add_depth
import data_prep.cli


def main() -> int:
    remaining = int(sys.argv[1])
    write_chunk = data_prep.add_depth.write_chunk

    def write_or_die(*arguments: Any) -> None:
        nonlocal remaining
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        remaining -= 1
        write_chunk(*arguments)

    data_prep.add_depth.CHUNK = 1
    data_prep.add_depth.write_chunk = write_or_die
    return data_prep.cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())

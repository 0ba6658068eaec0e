"""Entry point of `python -m data_prep`."""

from __future__ import annotations

import sys

try:
    from data_prep.cli import main
except KeyboardInterrupt:
    print("interrupted; nothing was begun", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())

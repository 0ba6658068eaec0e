"""`python -m spacedrive_jax`."""

import sys

try:
    from spacedrive_jax.cli.main import main
except KeyboardInterrupt:  # whoever sees a slip of the pen before the imports are done
    print("interrupted; nothing was begun", file=sys.stderr)
    sys.exit(130)

sys.exit(main())

"""`python -m spacedrive_jax`."""

import sys

from spacedrive_jax.cli import main

sys.exit(main())

"""`python -m spacedrive_jax`."""

import sys

from spacedrive_jax.cli.main import main

sys.exit(main())

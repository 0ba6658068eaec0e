"""A host of two: one fails at once, the other waits for it in a collective (`test_hosts.py`)."""

import sys

from jax.experimental import multihost_utils

from spacedrive_jax.errors import DataError
from spacedrive_jax.training.hosts import connect, failing_together

coordinator, process_id, fails = sys.argv[1:]
with failing_together():
    connect(coordinator, 2, int(process_id))
    if process_id == fails:
        raise DataError("records are damaged")
    multihost_utils.sync_global_devices("the other one")

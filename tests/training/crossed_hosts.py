"""The command line on hosts whose devices lie crosswise in the mesh, as on TPUs: what `tensor` splits lies on
several hosts, and these hold the same samples (`test_devices.py`).
"""

import sys

import jax

from spacedrive_jax.cli.main import main

in_order = jax.make_mesh


def crosswise(*arguments, devices, **options):
    return in_order(*arguments, devices=devices[::2] + devices[1::2], **options)


if __name__ == "__main__":
    jax.make_mesh = crosswise
    sys.exit(main(sys.argv[1:]))

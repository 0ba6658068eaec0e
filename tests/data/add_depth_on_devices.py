"""Runs `add-depth` on all devices of this process and looks at the program of a step: `RECORDS NETWORK`."""

import json
import re
import sys
from pathlib import Path

import jax

from data_prep.add_depth import add_depth
from spacedrive_jax.data.records import open_records
from spacedrive_jax.inference.depth_network import DepthNetworkConfig, KeyframeDepth

COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
IMAGES = 12


def main(records: str, network: str) -> None:
    config = DepthNetworkConfig.from_file(Path(network))
    add_depth(open_records(Path(records)), config)
    program = KeyframeDepth(config).compiled(IMAGES)
    depth, _ = program.output_shardings
    step = {
        "devices": jax.local_device_count(),
        "images_each": depth.shard_shape((IMAGES, *config.image_size))[0],
        "collectives": sorted(set(re.findall(COLLECTIVES, program.as_text()))),
    }
    print(json.dumps({"step": step}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""SpaceDrive+ as published (paper, table 1, and the last row of table 3 with ego status).

The command is the published one, from the ground-truth endpoint: it leaks the answer's direction.
"""

from spacedrive_jax.config import change, load_preset

config = change(
    load_preset("spacedrive_qwen_7b"),
    "table1_spacedrive_plus",
    {"model.ego_status": "both", "data.command": "released"},
)

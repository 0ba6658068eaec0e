"""Several hosts as one run: start-up from flags or from the cluster's environment."""

from __future__ import annotations

import jax

from spacedrive_jax.console import UserError


def connect(coordinator: str | None, host_count: int | None, host_index: int | None) -> None:
    """Joins the hosts of a run; call it before anything touches a device.

    Args:
        coordinator: `auto` reads the cluster's environment (SLURM, Open MPI, GKE and Cloud TPU, Kubernetes);
            `HOST:PORT` of the first host goes with the other two; None is a single host.
        host_count: hosts in the run.
        host_index: this host, from 0.

    Raises:
        UserError: the three do not go together, or the hosts do not find each other.
    """
    if coordinator is None:
        if host_count is not None or host_index is not None:
            raise UserError("--host-count and --host-index need --coordinator HOST:PORT")
        return
    explicit = coordinator != "auto"
    if explicit and (host_count is None or host_index is None or not 0 <= host_index < host_count):
        raise UserError(
            f"--coordinator {coordinator} needs --host-count N and --host-index 0..N-1, got {host_count} and "
            f"{host_index}; on SLURM, GKE and Cloud TPU --coordinator auto finds all three"
        )
    try:
        if explicit:
            jax.distributed.initialize(coordinator, host_count, host_index)
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the hosts of the run could not be joined: {error}") from error

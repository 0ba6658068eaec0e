"""`python -m spacedrive_jax serve`: a policy server for whoever drives."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import tyro

from spacedrive_jax.bounds import Bound, Bounds
from spacedrive_jax.cli.common import mesh_of, server_token, use_compilation_cache
from spacedrive_jax.console import Command, note
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.io import file_sha256


def _leave() -> None:
    """Ends the process as it is, once all is said."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@dataclasses.dataclass(frozen=True)
class Serve(Command):
    """Serve a trained model to simulators, over websockets with msgpack.

    Compiles first; GET /healthz answers 200 once clients are let in. Requests of several clients go through
    the model together. SIGTERM or Ctrl-C ends it: what is under way is answered.

    Example: python -m spacedrive_jax serve --checkpoint runs/demo --port 8000
    """

    checkpoint: Path | None = None
    """Run folder (its newest checkpoint), RUN/checkpoints/STEP, or a folder of import-weights --from
    spacedrive."""
    exported: Path | None = None
    """Instead of --checkpoint: a folder that --export wrote, run without the model's source."""
    export: Path | None = None
    """Write the planning step (StableHLO), its weights and metadata into this new folder; do not serve."""
    host: str = "127.0.0.1"
    """Address to serve on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to serve on; 0 takes a free one."""
    token: str | None = None
    """Clients must bring this token; by default what the environment variable SPACEDRIVE_TOKEN says, if
    anything. (Other users of the machine can read command lines; the variable they cannot.)"""
    batch_size: int = 8
    """Most requests that go through the model together, over all devices."""
    wait_ms: float = 5.0
    """Longest wait of a request for others to go with it, or a quarter of what a batch takes where that is
    longer; 0 never waits."""
    most_clients: int = 64
    """Sessions at a time."""
    most_megabytes: int = 64
    """Largest message."""
    mesh: str | None = None
    """Devices along each axis, such as data=4,fsdp=2 (one may be -1). By default the run's where it fits the
    devices there are, else all of them along fsdp."""
    depth_model: Path | None = None
    """Weights (or add-depth's JSON file) of the depth network, where the model's depth comes from one."""
    average: tyro.conf.FlagCreatePairsOff[bool] = False
    """Serve the moving average of the weights that `--train.ema-decay` keeps."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs between runs; by default JAX_COMPILATION_CACHE_DIR, else the user's
    cache folder."""

    BUCKETS: ClassVar[tuple[str, ...]] = ("checkpoint", "compilation_cache")
    BOUNDS: ClassVar[Bounds] = {
        "port": Bound(0, 65535),
        "batch_size": Bound(1, 4096),
        "wait_ms": Bound(0, 10_000),
        "most_clients": Bound(1, 100_000),
        "most_megabytes": Bound(1, 4095),
    }

    def run(self) -> Mapping[str, Any]:
        """Serves until told to stop; returns what was done."""
        if (self.checkpoint is None) == (self.exported is None):
            raise ConfigError("give --checkpoint PATH or --exported DIR, one of the two")
        use_compilation_cache(self.compilation_cache)
        if self.mesh is not None and (self.exported is not None or self.export is not None):
            raise ConfigError("--mesh goes with --checkpoint alone: an export runs on one device")
        if self.average and self.exported is not None:
            raise ConfigError("--average goes with --checkpoint: an export has the weights it was given")
        if self.export is not None:
            return self._export(self.export)
        from spacedrive_jax.driving.model_policy import ModelPolicy, open_depth_network, warm_up_record
        from spacedrive_jax.driving.server import PolicyServer, ServerConfig

        if self.exported is not None:
            from spacedrive_jax.inference.planner import EXPORT_METADATA, open_exported

            planner = open_exported(self.exported, most=self.batch_size)
            weights = file_sha256(self.exported / EXPORT_METADATA)
        else:
            from spacedrive_jax.inference.open_model import name_checkpoint
            from spacedrive_jax.inference.open_planner import open_planner

            assert self.checkpoint is not None
            planner = open_planner(
                self.checkpoint,
                warm_up_record(),
                average=self.average,
                most=self.batch_size,
                mesh=mesh_of(self.mesh),
            )
            weights = str(name_checkpoint(self.checkpoint)["trainable_fingerprint"])
            if self.average:
                weights = hashlib.sha256(f"{weights} average".encode()).hexdigest()
        network = None if self.depth_model is None else open_depth_network(self.depth_model, planner.config)
        policy = ModelPolicy(planner, network, weights[:16])
        config = ServerConfig(
            self.host,
            self.port,
            server_token(self.token),
            self.wait_ms,
            self.most_clients,
            self.most_megabytes << 20,
        )
        if config.token is None and self.host not in ("127.0.0.1", "localhost", "::1"):
            note(f"whoever reaches {self.host}:{self.port} can use the model: --token keeps others out")

        def ready(server: PolicyServer) -> None:
            print(f"serving {policy.metadata['model']} on ws://{self.host}:{server.port}", flush=True)

        server = PolicyServer(policy, config)
        # A compile that still goes on would abort the process when the interpreter ends below it.
        atexit.register(lambda: _leave() if server.is_warming_up else None)
        served = server.run(ready, signals=True)
        print(
            f"{served.requests} requests of {served.sessions} sessions in {served.batches} batches, "
            f"{served.refused} refused",
            file=sys.stderr,
        )
        return dataclasses.asdict(served)

    def _export(self, folder: Path) -> Mapping[str, Any]:
        from spacedrive_jax.driving.model_policy import warm_up_record
        from spacedrive_jax.inference.open_planner import export_planner

        if self.checkpoint is None:
            raise ConfigError("--export needs --checkpoint PATH")
        if os.path.lexists(folder):
            raise ConfigError(f"--export {folder} exists: choose another folder, or remove it first")
        outcome = export_planner(
            self.checkpoint, folder, warm_up_record(), average=self.average, most=self.batch_size
        )
        print(f"exported {outcome['model']} for batches of {outcome['batch']} to {folder}")
        return outcome

"""Records of drives: every state that a policy reached, with the expert's plan from there as the target."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spacedrive_jax.data.records_folder import content_fingerprint, ends_sha256, file_sha256
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.shards import (
    RecordSerializer,
    ShardFacts,
    shard_file,
    write_dataset_info,
    write_shard,
)
from spacedrive_jax.errors import DataError
from spacedrive_jax.io import write_json, write_text

PARTS = "parts"
DESCRIPTION = "States that a policy reached in the synthetic world, with the expert's plans from there."


class CollectedRecords:
    """A records folder that grows drive by drive; `finish` makes it one that `train` reads."""

    def __init__(self, folder: Path) -> None:
        """Args: the folder; drives that it already holds parts of are kept (a resumed run)."""
        self.folder = folder
        self._serialize = RecordSerializer()

    def add(self, drive: str, records: Sequence[Record]) -> None:
        """Keeps the records of one drive, by its name."""
        if records:
            path = self._part(drive)
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = write_shard(path, (self._serialize(record) for record in records))
            write_text(path.with_suffix(".count"), str(facts.records))

    def finish(self, drives: Sequence[str], source: Mapping[str, Any]) -> int:
        """Names the shards in the order of `drives`, writes what describes them and returns their records.

        Raises:
            DataError: there is no record.
        """
        parts = [self._part(drive) for drive in drives if self._part(drive).is_file()]
        if not parts:
            raise DataError(f"--collect {self.folder}: no drive left a record")
        shards = []
        for index, part in enumerate(parts):
            records = int(part.with_suffix(".count").read_text())
            final = self.folder / shard_file("train", index, len(parts))
            # Linked, not moved: what an interrupted `finish` leaves can be finished again.
            final.unlink(missing_ok=True)
            os.link(part, final)
            shards.append(
                ShardFacts(final.name, records, final.stat().st_size, file_sha256(final), ends_sha256(final))
            )
        shutil.rmtree(self.folder / PARTS)
        total = sum(shard.records for shard in shards)
        write_dataset_info(self.folder, {"train": shards}, DESCRIPTION)
        write_json(
            self.folder / "provenance.json",
            {
                "source": {"version": "drives", **source},
                "shards": {
                    shard.file: {
                        "keyframes": shard.records,
                        "bytes": shard.bytes,
                        "sha256": shard.sha256,
                        "ends_sha256": shard.ends_sha256,
                    }
                    for shard in shards
                },
                "fingerprint": content_fingerprint((shard.file, shard.sha256) for shard in shards),
                "records": total,
                "splits": {"train": total},
                "licence": "Synthetic: made by this project's own world.",
            },
            indent=1,
        )
        return total

    def _part(self, drive: str) -> Path:
        return self.folder / PARTS / f"{drive}.array_record"

"""The weights folder: what `import-weights` writes, `model.weights` takes and `export-weights` reads.

    config.json, model*.safetensors   the base, as transformers has it, in the types it came in
    tokenizer.json, ...               the tokenizer with the two coordinate tokens
    adapter/                          low-rank adapters, as PEFT has them (only if there are any)
    weights.json                      what this is: `WeightsMetadata`

transformers and PEFT load it as it stands.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from spacedrive_jax.errors import CheckpointError, DataError
from spacedrive_jax.interop.hf_checkpoint import from_hf
from spacedrive_jax.interop.peft import load_adapter, read_peft_config
from spacedrive_jax.io import MEBIBYTE, read_bytes, write_json
from spacedrive_jax.models.config import ComputeConfig, NewTokensConfig
from spacedrive_jax.models.partitioning import ShardingOf
from spacedrive_jax.models.vision_language import VisionLanguageModel

METADATA_FILE = "weights.json"
ADAPTER_FOLDER = "adapter"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class WeightsMetadata:
    """What a weights folder says about itself."""

    family: str
    """transformers' `model_type`."""
    source: str
    """Where the base came from; what adapters exported from here name as theirs."""
    tensors: int
    parameters: int
    """Numbers in the base."""
    dtypes: tuple[str, ...]
    fingerprint: str
    """SHA-256 over the names, types, shapes and values of the base."""
    new_tokens: int | None
    """Id of the indicator token, the position token's being the next; None without the two."""
    adapter_rank: int | None = None
    adapter_source: str | None = None
    """Where the adapters came from."""
    format: int = FORMAT

    @classmethod
    def of(
        cls,
        family: str,
        source: Path,
        base: Fingerprint,
        *,
        new_tokens: int | None,
        adapter_rank: int | None = None,
    ) -> WeightsMetadata:
        """The facts of a folder whose base, of the family of this name, has passed through `base`."""
        return cls(
            family=family,
            source=str(source),
            tensors=base.tensors,
            parameters=base.parameters,
            dtypes=tuple(sorted(base.dtypes)),
            fingerprint=base.value,
            new_tokens=new_tokens,
            adapter_rank=adapter_rank,
        )

    def write(self, folder: Path) -> None:
        """Writes weights.json."""
        write_json(folder / METADATA_FILE, dataclasses.asdict(self), indent=2)

    @classmethod
    def read(cls, folder: Path) -> WeightsMetadata:
        """Reads weights.json.

        Raises:
            CheckpointError: If it is missing, damaged or of another version.
        """
        file = Path(folder) / METADATA_FILE
        try:
            metadata = msgspec.json.decode(read_bytes(file, most=MEBIBYTE), type=cls)
        except (DataError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{file} is not readable ({error}); give a folder that import-weights wrote"
            ) from error
        if metadata.format != FORMAT:
            raise CheckpointError(
                f"{file} has format {metadata.format}, this version reads {FORMAT}: import again"
            )
        return dataclasses.replace(metadata, dtypes=tuple(metadata.dtypes))


class Fingerprint:
    """SHA-256 of a stream of named tensors, taken while it passes; counts them too."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.tensors = self.parameters = 0
        self.dtypes: set[str] = set()

    def watch(self, tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        """Passes the tensors on."""
        for name, tensor in tensors:
            tensor = np.ascontiguousarray(tensor)
            self._hash.update(f"{name} {tensor.dtype} {tensor.shape};".encode())
            self._hash.update(tensor.reshape(-1).view(np.uint8).data)
            self.tensors += 1
            self.parameters += tensor.size
            self.dtypes.add(str(tensor.dtype))
            yield name, tensor

    @property
    def value(self) -> str:
        """The digest so far, in hexadecimal."""
        return self._hash.hexdigest()


def load(
    folder: str | Path,
    *,
    compute: ComputeConfig | None = None,
    trainable_tokens: bool = False,
    shardings: ShardingOf | None = None,
) -> VisionLanguageModel:
    """Loads a weights folder with its adapters.

    Args:
        folder: What `import-weights` wrote.
        compute: Dtypes, rematerialisation, attention kernel.
        trainable_tokens: Give the two coordinate tokens trainable rows of their own.
        shardings: Placement of each parameter; None puts them on the default device.

    Returns:
        The model.

    Raises:
        CheckpointError: If the folder is not one, or its files are damaged or do not fit each other.
    """
    folder = Path(folder)
    metadata = WeightsMetadata.read(folder)
    adapter = folder / ADAPTER_FOLDER
    lora = None if metadata.adapter_rank is None else read_peft_config(adapter)
    rows = (
        NewTokensConfig(metadata.new_tokens) if trainable_tokens and metadata.new_tokens is not None else None
    )
    model = from_hf(folder, compute=compute, lora=lora, new_tokens=rows, shardings=shardings)
    if lora is not None:
        load_adapter(model, adapter)
    return model

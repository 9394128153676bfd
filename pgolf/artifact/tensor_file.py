"""What a counted program uses of the package safetensors, which is not one of the challenge's packages.

`pgolf.artifact.portable` puts this module in place of safetensors. The format: 8 bytes with the length of the
header, little-endian; the header, JSON with dtype, shape and place of every tensor and strings under
`__metadata__`; the tensors' bytes. Tests read with each what the other wrote.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pgolf.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorError(UserError):
    """A file that is not as the format says."""


def save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a file with contiguous tensors of the host and strings about them."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values()]
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


class safe_open:
    """A file that is open for reading, as a context; tensors are read when they are asked for."""

    def __init__(self, path: str | Path, framework: str = "pt") -> None:
        """Read the header.

        Raises:
            OSError: the file cannot be read. SafetensorError: it is damaged, or no such file.
        """
        del framework  # always PyTorch
        self._path, self._file = path, Path(path).open("rb")  # noqa: SIM115 - closed by __exit__
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            self._file.close()
            raise SafetensorError(f"{path}: invalid header ({e}); expected a safetensors file") from e

    def _read_header(self) -> None:
        size = int.from_bytes(self._file.read(8), "little")
        rest = os.fstat(self._file.fileno()).st_size - 8 - size
        if rest < 0:
            raise ValueError(f"a header of {size} bytes is longer than the file")
        header = json.loads(self._file.read(size))
        self._metadata: dict[str, str] = header.pop("__metadata__", {})
        self._begin, self._entries = 8 + size, header
        for entry in header.values():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= rest or end - begin != _bytes(entry):
                raise ValueError(f"a tensor claims bytes {begin} to {end} of {rest}")

    def __enter__(self) -> safe_open:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        """Return the names of the tensors."""
        return sorted(self._entries)

    def metadata(self) -> dict[str, str]:
        """Return the strings about them."""
        return self._metadata

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            SafetensorError: no tensor of this name.
        """
        if name not in self._entries:
            raise SafetensorError(f"{self._path}: no tensor {name!r} in the file")
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        data = bytearray(end - begin)
        self._file.seek(self._begin + begin)
        self._file.readinto(data)
        dtype = DTYPES[entry["dtype"]]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(entry["shape"])


def _bytes(entry: dict[str, Any]) -> int:
    count: int = math.prod(entry["shape"])
    return count * DTYPES[entry["dtype"]].itemsize

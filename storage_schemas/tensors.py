"""Named arrays as one safetensors file that is deterministic and checks itself.

safetensors notices no flipped bit and writes several metadata keys in random order. So there is
one key, `diffem`: canonical JSON with the caller's metadata and `content`, the SHA-256 over
metadata, names, types, shapes and bytes of the arrays. Equal input gives equal bytes; the SHA-256
of the file names the model everywhere (`model_digest`). Any safetensors reader opens the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage_schemas.documents import canonical_json
from storage_schemas.errors import DamageError

__all__ = ["decode_tensors", "encode_tensors"]

_KEY = "diffem"


def encode_tensors(
    tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any] | None = None
) -> bytes:
    """Return arrays as the bytes of a safetensors file.

    Arguments:
        tensors: Arrays of any shape; floating, integer or boolean, little-endian in the file.
        metadata: JSON-able, finite.
    """
    from safetensors.numpy import save

    arrays = {name: np.require(tensors[name], requirements="C") for name in sorted(tensors)}
    given = dict(metadata or {})
    note = {"content": _content_digest(arrays, given), "metadata": given}
    return bytes(save(arrays, metadata={_KEY: canonical_json(note).decode("ascii")}))


def decode_tensors(
    data: bytes, *, path: str, checked: bool = False
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the arrays and the metadata in the bytes of a safetensors file.

    Arguments:
        data: The file.
        path: Its path, for messages.
        checked: Whether the caller has compared the file's own checksum already.

    Raises:
        DamageError: If the file is not what was written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        length = int.from_bytes(data[:8], "little")
        note = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
        content, metadata = note["content"], note["metadata"]
        arrays = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamageError(path, f"is not a tensor file of this package ({error})") from error
    if not checked and content != _content_digest(arrays, metadata):
        raise DamageError(path, "does not answer to its checksum")
    return arrays, metadata


def _content_digest(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> str:
    heads = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
    digest = hashlib.sha256(canonical_json([metadata, heads]))
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()

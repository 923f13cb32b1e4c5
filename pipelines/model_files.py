"""Models that exist already: reading one from anywhere, and putting it into a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from diffem_core.denoiser import Denoiser
from storage_schemas.errors import DamageError
from storage_schemas.objects import redact_url
from storage_schemas.tensors import decode_tensors

__all__ = ["load_weights", "read_model"]


def read_model(url: str) -> dict[str, NDArray[Any]]:
    """Read a model's weights.

    Arguments:
        url: Path or fsspec URL of a `model.safetensors` that a run wrote.

    Returns:
        The weights by name.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    import fsspec

    shown = redact_url(url)
    try:
        with fsspec.open(url, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise ValueError(f"there is no model at {shown}; give a model.safetensors") from None
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"the model {shown} cannot be read ({error})") from error
    try:
        return decode_tensors(data, path=shown)[0]
    except DamageError as error:
        raise ValueError(f"{error}; give the model.safetensors of a run") from error


def load_weights(denoiser: Denoiser, weights: Mapping[str, Tensor]) -> None:
    """Put weights into a denoiser.

    Arguments:
        denoiser: The denoiser.
        weights: Tensors by name.

    Raises:
        ValueError: The weights belong to another network.
    """
    expected = {name: tuple(t.shape) for name, t in denoiser.state_dict().items()}
    received = {name: tuple(a.shape) for name, a in weights.items()}
    for name in [*expected, *received]:
        if expected.get(name) != received.get(name):
            raise ValueError(
                f"the model holds {received.get(name, 'nothing')} for {name} where this network "
                f"expects {expected.get(name, 'nothing')}; give the model of the same network, "
                "channel and method"
            )
    denoiser.load_state_dict(dict(weights))

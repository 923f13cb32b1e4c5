"""Feature configs to functions of images: what metrics compare sets of samples by.

A network whose weights are not there is no mistake of the config: the metric is left out, with the
reason (`NoFeatures`). A class that does not exist is one.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffem_core.classifier import DigitClassifier
from diffem_core.feature_distance import PrincipalComponents
from diffem_core.image_quality import Lpips
from diffem_core.scaling import Scaling
from pipelines.build.targets import build_target
from storage_schemas import config as models

__all__ = [
    "Features",
    "NoFeatures",
    "as_pictures",
    "build_lpips",
    "build_set_features",
    "check_set_metrics",
]

Features = Callable[[Tensor], Tensor]
"""A function of samples in data units, shape (n, *x_shape), which returns (n, F)."""

_BATCH = 64
_INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
_FITTED = 4096  # clean samples, at most, that principal components are fitted to


class NoFeatures(Exception):
    """Features cannot be had here; the message says why, and what to do."""


def as_pictures(x: Tensor, scaling: Scaling) -> Tensor:
    """Bring images to [0, 1] (complex ones: their magnitude), and vectors to network units.

    Arguments:
        x: Samples in data units, shape (n, C, H, W) or (n, D).
        scaling: The change to network units, in which images span [-2, 2].

    Returns:
        Shape (n, C, H, W) with C other than 2, or (n, D).
    """
    z = scaling.to_network(x).float()
    if z.ndim == 2:
        return z
    if z.shape[1] == 2:
        return (z.square().sum(1, keepdim=True).sqrt() / 2).clamp(0, 1)
    return ((z + 2) / 4).clamp(0, 1)


def build_set_features(
    config: models.FeatureMetric | models.InceptionScoreMetric,
    *,
    scaling: Scaling,
    clean: Tensor,
    classifier: DigitClassifier | None,
    device: torch.device,
) -> Features:
    """Build the features that a metric of sets of samples is taken in.

    Arguments:
        config: The metric.
        scaling: The change to network units.
        clean: Clean samples, to which principal components are fitted.
        classifier: The classifier of clean images; None where they have no labels.
        device: Where networks are put.

    Raises:
        NoFeatures: They cannot be had.
        ValueError: The config names a class that does not exist, or does not take its arguments.
    """
    name = getattr(config, "name", "inception_score")
    key = f"evaluation.metrics.{name}"
    logits = isinstance(config, models.InceptionScoreMetric)
    match config.features:
        case "components":
            assert isinstance(config, models.FeatureMetric)
            some = as_pictures(clean[:_FITTED], scaling).flatten(1)
            if not bool((some != some[0]).any()):
                raise NoFeatures("every clean sample is the same")
            principal = PrincipalComponents.fit(some, config.components)
            return lambda x: principal(as_pictures(x, scaling).flatten(1))
        case "classifier":
            if classifier is None:
                raise NoFeatures(
                    "there is no classifier of the clean samples: it takes labelled, square "
                    "images of 8 pixels or more"
                )
            return classifier.logits if logits else classifier.features
        case "inception":
            if len(clean.shape) != 4:
                raise NoFeatures("Inception takes images, and the samples are vectors")
            network = _inception(config.weights, key, "logits_unbiased" if logits else "2048")
            return _of_pictures(lambda x: network(_bytes(x)), network, scaling, device, key)
        case target:
            own = _own(target, json.dumps(config.arguments, sort_keys=True), key)
            return _of_pictures(own, own, scaling, device, key)


def build_lpips(config: models.LpipsMetric, *, device: torch.device) -> Lpips:
    """Build the learned perceptual distance.

    Raises:
        NoFeatures: Its weights are not there, or not those of its network.
    """
    key = "evaluation.metrics.lpips"
    path = _file(config.weights, key, f"torchvision's weights of {config.network}")
    try:
        return _lpips(config.network, path, str(device))
    except (ValueError, RuntimeError, OSError, pickle.UnpicklingError) as problem:
        first = str(problem).partition("\n")[0]
        raise NoFeatures(f"{key}.weights {path!r} cannot be read: {first}") from problem


# ------------------------------------------------------------------------------------------- parts


@functools.lru_cache(maxsize=2)
def _lpips(network: Any, path: str, device: str) -> Lpips:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return Lpips(network, state, device=device)


@functools.lru_cache(maxsize=2)
def _inception(weights: str | None, key: str, layer: str) -> torch.nn.Module:
    path = _file(weights, key, f"{_INCEPTION}, which torch-fidelity publishes")
    if importlib.util.find_spec("torch_fidelity") is None:
        raise NoFeatures("Inception needs torch-fidelity: pip install 'diffem[metrics]'")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [layer], feature_extractor_weights_path=path
        )
    except (RuntimeError, KeyError, OSError, pickle.UnpicklingError) as problem:
        first = str(problem).partition("\n")[0]
        raise NoFeatures(f"{key}.weights {path!r} cannot be read: {first}") from problem

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.network(x)[0]
            return out

    return First().eval()


@functools.lru_cache(maxsize=4)
def _own(target: str, arguments: str, key: str) -> Any:
    return build_target(target, arguments=json.loads(arguments), key=f"{key}.features")


def _file(path: str | None, key: str, what: str) -> str:
    if path is None:
        raise NoFeatures(f"{key}.weights names no local file with {what}")
    if not Path(path).is_file():
        raise NoFeatures(f"{key}.weights names {path!r}, where no file is; put there {what}")
    return path


def _of_pictures(
    function: Features, network: Any, scaling: Scaling, device: torch.device, key: str
) -> Features:
    """Make a function of pictures one of samples, batch by batch, and refuse bad rows."""
    if isinstance(network, torch.nn.Module):
        network.to(device)

    @torch.inference_mode()
    def features(x: Tensor) -> Tensor:
        parts = [
            function(as_pictures(part, scaling).to(device)).flatten(1).cpu()
            for part in torch.split(x, _BATCH)
        ]
        rows = torch.cat(parts)
        if len(rows) != len(x) or not bool(rows.isfinite().all()):
            raise ValueError(
                f"{key}.features made {len(rows)} rows of {len(x)} samples, or numbers that are "
                "not finite; return one finite row for each"
            )
        return rows

    return features


def _bytes(x: Tensor) -> Tensor:
    """Bring pictures to the three bands of bytes that Inception was made for."""
    three = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    return (three * 255).round().to(torch.uint8)


def check_set_metrics(
    config: models.EvaluationConfig, x_shape: tuple[int, ...], scaling: Scaling
) -> None:
    """Build the classes that metrics name, and pass two samples through them.

    Raises:
        ValueError: There is no such class, or it does not take its arguments or samples.
    """
    for metric in config.metrics:
        named: Mapping[str, Any] = metric.model_dump()
        if ":" not in named.get("features", ""):
            continue
        assert isinstance(metric, (models.FeatureMetric, models.InceptionScoreMetric))
        clean = torch.full((2, *x_shape), scaling.center)
        build_set_features(
            metric, scaling=scaling, clean=clean, classifier=None, device=torch.device("cpu")
        )(clean)

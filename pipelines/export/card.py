"""The model card, `README.md`: what data, what channel, what numbers, how it is loaded."""

from __future__ import annotations

import json
import re
from math import log10
from typing import Any

from pipelines.export.subject import Subject
from storage_schemas.redaction import without_secrets

__all__ = ["card"]

_LIBRARIES = {"diffusers": "diffusers", "onnx": "onnx"}

_SAFETENSORS = """
from safetensors.numpy import load_file

weights = load_file("model.safetensors")            # names of the denoiser's state_dict
print(sum(array.size for array in weights.values()), "parameters")
"""

_SAMPLER = """
sigmas = torch.logspace({high:.6f}, {low:.6f}, {steps}, 10.0).tolist() + [0.0]
x_t = sigmas[0] * torch.randn(n, {shape})
for sigma, sigma_next in zip(sigmas, sigmas[1:]):
    x_hat = {call}
    x_t = x_hat + (sigma_next / sigma) * (x_t - x_hat)
x = x_t / {scale} + {center}                       # in the data's units
"""

_TORCH = """
import torch

denoiser = torch.export.load("model.pt2").module()
n = 4{condition}"""

_ONNX = """
import onnxruntime
import torch

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])

def denoiser(*arguments):
    names = [entry.name for entry in session.get_inputs()]
    given = {{name: value.numpy() for name, value in zip(names, arguments)}}
    return torch.from_numpy(session.run(None, given)[0])

n = 4{condition}"""

_DIFFUSERS = """
from diffusers import DiffusionPipeline, UNet2DModel
import torch

unet = UNet2DModel.from_pretrained(".", subfolder="unet")       # the network alone
pipeline = DiffusionPipeline.from_pretrained(".", trust_remote_code=True)    # runs pipeline.py
n = 4{condition}
x = pipeline({call})                               # in the data's units
"""


def card(subject: Subject, format_: str, description: dict[str, Any], licence: str) -> str:
    """Write the model card.

    Arguments:
        subject: The model.
        format_: The format of the export.
        description: The content of `config.json`.
        licence: Licence of the weights.
    """
    run, config = subject.run, subject.run.config
    manifest = run.store.observations().manifest
    what = "posterior q(x | y)" if subject.what == "posterior" else "prior of clean samples"
    learned = (
        "a conditional denoiser, which draws samples of x given an observation"
        if subject.what == "posterior"
        else "an unconditional denoiser, which draws clean samples"
    )
    front = {"license": licence, "library_name": _LIBRARIES.get(format_, "diffem")}
    channel = config.channel.model_dump(mode="json")
    kind = channel.pop("kind")
    settings = ", ".join(f"{name}: {json.dumps(value)}" for name, value in channel.items())
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in front.items()),
        "tags: [diffusion, inverse-problems, corrupted-data, diffem]",
        "---",
        f"# {config.name}: {what}",
        "",
        f"{config.description or config.name}. {_method(config.method)}: {learned}.",
        "",
        "## Data",
        "",
        f"- {manifest.samples:,} observations, {manifest.holdout:,} of them held out for "
        f"evaluation; source: {_source(manifest.source)}",
        f"- clean samples have shape {tuple(manifest.x_shape)}, in {manifest.units or 'units'}"
        + (
            f", from {config.data.value_range[0]:g} to {config.data.value_range[1]:g}"
            if config.data.value_range
            else ""
        ),
        "- clean samples "
        + (
            "**are what it learned from**"
            if config.method == "clean"
            else "were known, and used for evaluation only"
            if manifest.truth
            else "were not known to anyone"
        ),
        "",
        "## Channel",
        "",
        f"`{kind}`"
        + (f" ({settings})" if settings else "")
        + f"; observations have shape {tuple(manifest.y_shape)}. The model knows no other: an "
        "observation that came about otherwise is restored wrongly, and with confidence.",
        "",
        *_condition(description),
        "## Measured",
        "",
        *_metrics(subject),
        "",
        "## Use",
        "",
        *_use(subject, format_, description),
        "`config.json` holds everything that is needed: shapes, units, equations of the "
        "preconditioning, noise levels, channel, checksums.",
        "",
        "## Where it comes from",
        "",
        f"Run `{config.name}` (config {run.store.manifest.config_digest[:12]}), EM iteration "
        f"{subject.iteration.iteration}, model {subject.model_digest[:12]}, diffem "
        f"{run.store.manifest.provenance.code_version}. Licence of the weights: {licence}.",
        "",
    ]
    return "\n".join(lines)


def _method(method: str) -> str:
    """Say in words what it learned from."""
    if method == "clean":
        return (
            "**A ceiling: trained on clean samples**, with which models that learn from "
            "observations are compared"
        )
    name = "DiffEM" if method == "diffem" else "EM-MMPS"
    return f"Learned from corrupted observations alone by {name} (arXiv 2510.12691)"


def _source(source: str) -> str:
    """Leave the folders of a local path out: they say nothing to others."""
    return without_secrets(re.sub(r"(?<![\w:/])/(?:[^/\s]+/)+", "", source)) or "not told"


def _condition(description: dict[str, Any]) -> list[str]:
    condition = description["condition"]
    if condition is None:
        return []
    return [
        f"The network sees, of shape {tuple(condition['shape'])}: {condition['holds']}. Network "
        f"units are {description['x']['network_units']} with center "
        f"{description['x']['center']:g} and scale {description['x']['scale']:g}.",
        "",
    ]


def _metrics(subject: Subject) -> list[str]:
    values = {} if subject.metrics is None else subject.metrics.values
    found = [(name, metric) for name, metric in values.items() if metric.value is not None]
    if not found:
        return ["Nothing."]
    lines = ["| name | | value | standard error | unit |", "|---|---|---|---|---|"]
    for name, metric in found:
        error = "" if metric.standard_error is None else f"{metric.standard_error:.2g}"
        lines.append(
            f"| `{name}` | {metric.long_name} | {metric.value:.4g} | {error} | {metric.units} |"
        )
    return lines


def _use(subject: Subject, format_: str, description: dict[str, Any]) -> list[str]:
    condition = ""
    if subject.condition_channels:
        shape = _numbers(subject.condition_shape)
        condition = f"\ncondition = torch.zeros(n, {shape})       # what the network sees of y"
    if format_ == "safetensors":
        return [
            "```python",
            _SAFETENSORS.strip(),
            "```",
            "",
            "The network is built by `diffem` (`config.json`, `network`), or by anything that "
            "has its parameters.",
            "",
        ]
    if format_ == "diffusers":
        call = "condition" if subject.condition_channels else "batch_size=n"
        code = _DIFFUSERS.format(condition=condition, call=call)
    else:
        code = (_TORCH if format_ == "torch-export" else _ONNX).format(condition=condition)
        code += _sampler(subject, description)
    return [
        "```python",
        code.strip(),
        "```",
        "",
        "The lines draw with the first-order solver of the probability-flow ODE (DDIM); the "
        "numbers above were measured with the sampler in `config.json`.",
        "",
    ]


def _numbers(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _sampler(subject: Subject, description: dict[str, Any]) -> str:
    schedule, sampler = description["schedule"], description["sampler"]
    more = ", condition" if subject.condition_channels else ""
    return _SAMPLER.format(
        high=log10(sampler["sigma_start"] or schedule["sigma_max"]),
        low=log10(sampler["sigma_end"] or schedule["sigma_min"]),
        steps=max(32, sampler["steps"]),
        shape=_numbers(subject.channel.x_shape),
        call=f"denoiser(x_t, torch.full((n,), sigma){more})",
        scale=description["x"]["scale"],
        center=description["x"]["center"],
    )

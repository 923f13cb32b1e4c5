"""The denoiser as a graph: `torch-export` and ONNX.

Both hold f(x_t, sigma_t, condition) with its preconditioning, for any number of samples. What
tracing leaves in a graph beside the computation, such as lines of source files, is taken out: it
would hold paths of the machine, and differ between machines.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from typing import Any

import torch

from pipelines.export.subject import Subject

__all__ = ["onnx_file", "require_onnx", "torch_export_file"]

_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "custom")
_ONNX_PACKAGES = ("onnx", "onnxscript")
_ONNX_LARGEST = 2_000_000_000


def torch_export_file(subject: Subject) -> bytes:
    """Return the denoiser as a file of `torch.export`."""
    buffer = io.BytesIO()
    torch.export.save(_exported(subject), buffer)
    return buffer.getvalue()


def require_onnx() -> None:
    """Refuse to go on without the packages that write ONNX.

    Raises:
        ValueError: One is not installed.
    """
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format onnx needs {' and '.join(missing)}, which is not installed; pip install "
            "'diffem[export]'"
        )


def onnx_file(subject: Subject) -> bytes:
    """Return the denoiser as an ONNX file.

    Raises:
        ValueError: A package is missing, or the weights are larger than one file may be.
    """
    require_onnx()
    if len(subject.weights) > _ONNX_LARGEST:
        raise ValueError(
            f"the model has {len(subject.weights):,} bytes but an ONNX file ends at 2 GB; take "
            "--format torch-export"
        )
    names = ["x_t", "sigma_t", "condition"][: len(subject.example(1))]
    with warnings.catch_warnings():
        # The exporter warns of what its own dependencies deprecate.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _exported(subject),
            (),
            dynamo=True,
            input_names=names,
            output_names=["x_hat"],
            verbose=False,
        )
    assert program is not None
    model: Any = program.model_proto
    graph = model.graph
    del graph.value_info[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.input, *graph.output):
        del value.metadata_props[:]
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    return bytes(model.SerializeToString(deterministic=True))


def _exported(subject: Subject) -> torch.export.ExportedProgram:
    arguments = subject.example(2)
    samples = torch.export.Dim("n", min=1)
    program = torch.export.export(
        subject.denoiser, arguments, dynamic_shapes=tuple({0: samples} for _ in arguments)
    )
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in _TRACES:
                node.meta.pop(key, None)
    return program

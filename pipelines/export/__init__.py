"""A learned model as a folder that other tools load.

| format | holds | is loaded by |
|---|---|---|
| `safetensors` | `model.safetensors` | any safetensors reader; the network by this package |
| `torch-export` | `model.pt2` | `torch.export.load`, without this package |
| `onnx` | `model.onnx` | ONNX Runtime and others, without this package |
| `diffusers` | a pipeline folder (network kind `diffusers`) | diffusers, without this package |

Beside it stand `config.json`, which says everything that is needed to use the model, and a model
card, `README.md`. Equal models give equal bytes: there is no date and no path in a folder.

| module | holds |
|---|---|
| `subject` | the model that is exported, and what belongs to it |
| `describe`, `card` | `config.json` and `README.md` |
| `graph` | `torch-export` and `onnx` |
| `hub`, `hub_pipeline` | `diffusers`; the code of its pipeline, which the folder holds |
| `write` | the request, and writing the folder |
"""

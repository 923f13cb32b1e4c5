"""Models of everything that a run stores, and its stores at any fsspec URL.

| module | holds |
|---|---|
| `config` | the run config |
| `json_schema`, `migrations` | its JSON Schema; from older schema versions to the present |
| `manifests`, `metrics`, `documents` | what was written, with checksums; JSON that checks itself |
| `objects`, `integrity` | bytes in and out, atomically, at any URL; are they what was written |
| `layout`, `zarr_objects`, `tensors` | Zarr arrays and safetensors as such bytes |
| `run_store`, `observations`, `start_store` | a run, its observations, its start |
| `iteration_store`, `reconstructions`, `stage_folder` | an EM iteration, its array, its stages |
| `lease` | one writer per run |
| `verify` | finding and repairing damage |
| `xarray_view` | a run as an `xarray.DataTree` |
| `provenance`, `errors`, `benchmark` | versions; what can go wrong; size and speed of the codecs |

Import from the modules. Only `zarr_objects` and `xarray_view` import Zarr and xarray; the others
import these two when an array is touched.
"""

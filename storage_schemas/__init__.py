"""Models of everything that a run stores, and its stores at any fsspec URL.

| module | holds |
|---|---|
| `config` | the run config |
| `json_schema`, `migrations` | its JSON Schema; from older schema versions to the present |
| `manifests`, `metrics`, `documents` | what was written, with checksums; JSON that checks itself |
| `objects` | bytes in and out, atomically, at any URL |
| `layout`, `zarr_objects`, `tensors` | Zarr arrays and safetensors as such bytes |
| `run_store`, `observations`, `start_store`, `iteration_store` | a run and its parts |
| `lease` | one writer per run |
| `verify` | finding and repairing damage |
| `xarray_view` | a run as an `xarray.DataTree` |

Import from the modules: none of them imports Zarr or xarray before an array is touched.
"""

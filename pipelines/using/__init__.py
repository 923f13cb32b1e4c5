"""Using what a run has learned: posterior and prior in Python, and from the command line.

| module | holds |
|---|---|
| `run` | `open_run`, and the posterior and prior that it gives |
| `arguments` | what is given to them, checked |
| `under_prior` | the posterior of another channel, under the learned prior (MMPS) |
| `incoming` | new observations: any source of `diffem ingest`, or a sealed store |
| `likeness` | do new observations look like those of the run? |
| `request`, `drawing` | what is to be restored; drawing some shards of it, also as a stage |
| `reconstruct`, `sample` | draws in shards, into a store that xarray opens |
| `pictures` | grids of samples |
"""

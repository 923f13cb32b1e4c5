"""Your own data: from files, arrays and data sets to sealed observations at any URL.

| module | holds |
|---|---|
| `base` | what every source gives: named arrays, read in blocks of rows |
| `arrays`, `images`, `datasets` | the sources |
| `opening` | which source a path or URL is |
| `request`, `roles` | what was asked for; which array is what |
| `blocks` | blocks of samples: read, checked, converted, corrupted |
| `write` | ... into the store; going on where an ingest was interrupted |
| `memory` | giving back to the system what a process no longer needs |
| `stored` | reading it back for a run |
"""

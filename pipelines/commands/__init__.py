"""The commands of `diffem`, one module each; `pipelines.cli` puts them together."""

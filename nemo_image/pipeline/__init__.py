"""Pipelines of stages, run on Dask: `Pipeline`, `DaskExecutor`, and configurations in YAML."""

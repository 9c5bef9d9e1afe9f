"""Adapters to the outside world: devices, checkpoints, logs, the run folder."""

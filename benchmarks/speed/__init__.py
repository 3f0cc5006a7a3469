"""Seconds, model calls and bytes of a training step and of a run, side by side: `python -m benchmarks.speed --help`."""

"""Cost of a training step and of a run in seconds, model calls and bytes: `python -m benchmarks.speed --help`."""

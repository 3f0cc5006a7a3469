"""The parts of `train.py`: command line, processes, optimizers, checkpoints, output folder and probe.

May import results, objectives, recording, adapters, families, diffusion, prompts, core.
"""

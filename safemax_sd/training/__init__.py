"""What `train.py` is built from: command line, processes, optimizers, checkpoints, output folder, probe.

May import results, objectives, recording, adapters, families, diffusion, prompts, core.
"""

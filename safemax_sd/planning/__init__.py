"""Plans: what a training would take, from a model's configurations alone.

May import train, training, objectives, recording, adapters, families, diffusion, prompts, presets, core.
"""

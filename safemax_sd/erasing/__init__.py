"""Closed-form erasure: edits, one file each, and the token states that they work on.

May import training, results, objectives, recording, adapters, families, diffusion, prompts, core.
"""

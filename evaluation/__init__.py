"""Evaluation of an erasure: pictures drawn with and without it, metrics on them, `report.json` and its page.

May import planning, train, erasing, training, results, objectives, recording, adapters, families, diffusion, prompts,
core.
"""

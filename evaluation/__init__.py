"""Measure an erasure: generate with and without the adapter, judge the pictures, write report.json and its page.

May import train, erasing, training, results, objectives, recording, adapters, families, diffusion, prompts, core.
"""

"""LoRA weights (attach, save, load), low-rank changes and the marks of a halting anchor.

May import families, diffusion, prompts, core.
"""

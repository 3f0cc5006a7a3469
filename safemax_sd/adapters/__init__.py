"""LoRA weights: attach, save, load; low-rank changes; what a halting anchor's marks are.

May import families, diffusion, prompts, core.
"""

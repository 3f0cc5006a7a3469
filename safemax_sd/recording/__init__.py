"""The replay bank, and all else that an objective draws from.

May import adapters, families, diffusion, prompts, core.
"""

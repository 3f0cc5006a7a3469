"""The replay bank and the other data that an objective draws from.

May import adapters, families, diffusion, prompts, core.
"""

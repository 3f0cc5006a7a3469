"""Results of a finished erasure: record, model card, exports and uploads.

May import objectives, recording, adapters, families, diffusion, prompts, core.
"""

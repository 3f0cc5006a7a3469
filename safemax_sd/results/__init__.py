"""What a finished erasure leaves: its record, model card, exports, uploads.

May import objectives, recording, adapters, families, diffusion, prompts, core.
"""

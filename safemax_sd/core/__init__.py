"""Errors, flags, discovery, provenance, the judge and pictures, which every other folder may use.

May import nothing of this package but assets.
"""

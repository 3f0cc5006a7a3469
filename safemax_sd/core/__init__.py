"""Errors, discovery, provenance, the judge, pictures: what every other folder may use.

May import nothing of this package but assets.
"""

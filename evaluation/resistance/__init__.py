"""Measure what an erasure withstands: attacks on it and on its controls, attacks.json and its page.

May import evaluation, attacks and what these may import.
"""

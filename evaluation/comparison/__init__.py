"""Comparison of methods on tasks: a grid of runs that can be resumed, then tables and a page.

May import resistance, attacks, evaluation and what these may import.
"""

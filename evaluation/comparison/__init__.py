"""Compare methods on tasks: a grid of runs that resumes, then tables and a page.

May import evaluation and what that may import.
"""

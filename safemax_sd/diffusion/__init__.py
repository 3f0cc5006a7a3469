"""Schedules and parametrisations: all noise mathematics.

May import core.
"""

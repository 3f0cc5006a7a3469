"""Prompt suites written from words: what a word means, what lies near it, and the templates of each kind.

May import training and whatever lies below it.
"""

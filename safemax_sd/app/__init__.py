"""The local web page of `safemax app`: one file a tab, and the queue of its runs with their process.

May import every other folder but commands.
"""

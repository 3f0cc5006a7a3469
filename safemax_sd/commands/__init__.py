"""The commands of `safemax`, one thin file each.

May import every other folder.
"""

"""Closed-form edits: one file each, found by discovery."""

from safemax_sd.erasing.edits.base import EDITS, ClosedFormEdit, EditData

__all__ = ["EDITS", "ClosedFormEdit", "EditData"]

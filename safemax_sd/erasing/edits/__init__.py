"""Closed-form edits: one file each, found by discovery."""

from safemax_sd.erasing.edits.base import EDITS, BaseModelConfig, BaseModelEdit, ClosedFormEdit, EditConfig

__all__ = ["EDITS", "BaseModelConfig", "BaseModelEdit", "ClosedFormEdit", "EditConfig"]

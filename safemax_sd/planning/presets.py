"""Plans of presets."""

from __future__ import annotations

import logging

from safemax_sd.planning.plan import Plan, make_plan
from safemax_sd.prompts import load_suite
from safemax_sd.training.command_line import parse_config

SUITE = "imagenette/church"
"""Prompts that presets are planned with: they matter for the size of the token states alone."""


def planned(name: str) -> Plan:
    """Plan a training with a preset and the prompts of `SUITE`.

    Raises:
        OptionError: No preset has that name.
    """
    suite = load_suite(SUITE)
    prompts = [f"--{part}_prompts={suite.path(part)}" for part in ("forget", "retain")]
    logger = logging.getLogger("safemax_sd")
    before, logger.disabled = logger.disabled, True  # shipped configurations have no vocabularies
    try:
        return make_plan(parse_config(["--preset", name, *prompts]))
    finally:
        logger.disabled = before

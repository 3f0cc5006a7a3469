"""`safemax presets`: the presets of the package, with the peak memory that each is planned to take."""

from __future__ import annotations

from safemax_sd.commands.console import one_line_errors, say


def presets() -> None:
    """List the presets, what they set, and their planned peak memory."""
    from safemax_sd.planning.plan import in_bytes
    from safemax_sd.planning.presets import planned
    from safemax_sd.presets import card_gib, preset_names, preset_path
    from safemax_sd.training.command_line import read_yaml

    with one_line_errors():
        for name in preset_names():
            peak = planned(name).peak
            say(f"{name}: planned peak {in_bytes(peak.total)} of {card_gib(name)} GiB, in {peak.name}")
            for flag, value in read_yaml(str(preset_path(name))).items():
                say(f"  {flag}: {value}")

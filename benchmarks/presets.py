"""Write the table of presets in docs/what_fits_where.md: `python -m benchmarks.presets`."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.results import markdown_line
from safemax_sd.planning.plan import Plan, in_bytes
from safemax_sd.planning.presets import planned
from safemax_sd.presets import card_gib, preset_names

DOCUMENT = Path(__file__).parents[1] / "docs" / "what_fits_where.md"
TABLE = re.compile(r"(<!-- presets -->\n\|[^\n]*\n\| ---[^\n]*\n)(.*?)(<!-- end of presets -->)", re.DOTALL)


def row(name: str, plan: Plan) -> str:
    """Return a preset's line of the table."""
    config, phases = plan.config, {phase.name: in_bytes(phase.total) for phase in plan.memory.phases}
    cells = [
        f"`{name}`",
        f"{plan.resolution}",
        f"{config.train_batch_size} x {config.gradient_accumulation_steps}",
        f"{config.replay_batch_size}",
        f"{plan.memory.trained.parameters / 1e6:.1f} M",
        phases["encoding and replay"],
        phases["training step"],
        f"{100 * plan.peak.total / 2**30 / card_gib(name):.0f} %",
        in_bytes(sum(plan.banks.values())),
        f"{sum(plan.rehearsal.model_calls.values()):,}",
    ]
    return f"{markdown_line(cells)}\n"


def rows_of(text: str) -> list[str]:
    """Return the lines of a document's table of presets."""
    found = TABLE.search(text)
    assert found is not None, "the table's markers are missing"
    return found[2].splitlines(keepends=True)


def main() -> None:
    rows = "".join(row(name, planned(name)) for name in preset_names())
    text = DOCUMENT.read_text(encoding="utf8")
    DOCUMENT.write_text(TABLE.sub(lambda found: f"{found[1]}{rows}{found[3]}", text), encoding="utf8")


if __name__ == "__main__":
    main()

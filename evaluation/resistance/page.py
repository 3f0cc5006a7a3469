"""The page of the attacks: what each brings back, beside its controls."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image
from safemax_sd.evaluation.attacks.base import ATTACKS
from safemax_sd.evaluation.page import STYLE_SHEET, data_uri
from safemax_sd.evaluation.plots import Line, sweep_plot
from safemax_sd.evaluation.resistance.curves import curves
from safemax_sd.evaluation.resistance.report import STRONG, AttackReport, AttackRow, Excess, Rate, Verdict, verdicts

from safemax_sd.core.pictures import contact_sheet
from safemax_sd.core.provenance import atomic_write_text

PAGE_FILE, PICTURES = "index.html", "pictures"
SHOWN = 8
"""Pictures of a target on the page."""
LARGEST_SIDE = 256
"""Largest width of these pictures in pixels; larger ones are scaled down."""
SHEET_QUALITY = 85
"""WebP quality of the contact sheets; lossy, since noise does not compress and a page has dozens of them."""
ROLES: dict[str, str] = {
    "erased": "erased",
    "base": "base model",
    "never_known": "never known",
    "untaught": "never taught",
}
"""Names of the targets for a reader, in the order of the table's columns."""
ROLE_NOTES: dict[str, str] = {
    "erased": "the model with the erasure merged into its weights, as it is given away",
    "base": f"the model before the erasure; an attack below {STRONG:.0f} % here is too weak to show anything",
    "never_known": "a model trained without the concepts: whatever an attack draws here, it has taught",
    "untaught": "the base model, attacked for {untaught}, which it was never taught: likewise",
}
"""Meanings of the targets."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
<h1>{title}</h1>
<p class="lead">{lead}</p>
<p>Every attack runs in the same way on:</p>{roles}
<h2>What each attack brings back</h2>
<p>{note}</p>
{table}
{refusals}
{figures}
{curves}
<h2>Pictures</h2>
<p>Of the strongest try or, where any try counts, each prompt’s first success.</p>
{pictures}
{tries}
</main></body></html>
"""


def write_sheet(folder: Path, attack: str, role: str, pictures: Sequence[Image.Image]) -> None:
    """Write the contact sheet of an attack on a target into the folder `pictures`."""
    scale = min(1.0, LARGEST_SIDE / pictures[0].width)
    sheet = contact_sheet(pictures[:SHOWN], SHOWN, scale=scale)
    sheet.save(folder / PICTURES / f"{attack}-{role}.webp", quality=SHEET_QUALITY)


def find_sheet(folder: Path, row: AttackRow) -> Path | None:
    """Return the contact sheet of a row, PNG in folders of earlier versions; None if there is none."""
    return next((folder / PICTURES).glob(f"{row.attack}-{row.target}.*"), None)


def caption(row: AttackRow) -> str:
    """Return the caption of a row's pictures: attack, target and success, unless that shows nothing."""
    counted = f": {format_rate(row.success)}" if row.success_counts else ""
    return f"{label(row.attack)}, {ROLES[row.target]}{counted}"


def write_page(report: AttackReport, folder: Path) -> Path:
    """Write `index.html` beside the folder `pictures` and return its path."""
    page = PAGE.format(
        title=html.escape(
            f"Attacks on {'controls of ' if report.adapter is None else ''}the erasure of {quoted(report.concepts)}"
        ),
        style=STYLE_SHEET.read_text(encoding="utf8"),
        lead=html.escape(
            f"{'Not erased' if report.adapter is None else f'Erased by {report.adapter}'}; suite {report.suite}; "
            f"judge: {report.judge}. Intervals are 95 %."
        ),
        roles=_roles(report),
        table=_table(report),
        note=html.escape(_note(report)),
        refusals=_refusals(report),
        figures=_figures(report),
        curves=_curves(report),
        pictures=_pictures(report, folder),
        tries=_tries(report),
    )
    atomic_write_text(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def quoted(names: Sequence[str]) -> str:
    """Return names in quotation marks, separated by commas."""
    return ", ".join(f"“{name}”" for name in names)


def label(attack: str) -> str:
    """Return an attack's name for a reader; its own name if it is not installed here."""
    return ATTACKS.get(attack).label if attack in ATTACKS.names() else attack


def explanation(attack: str, text: Literal["note", "figures_note", "x_label"]) -> str:
    """Return one of an attack's texts for a reader; nothing if it is not installed here."""
    return str(getattr(ATTACKS.get(attack), text)) if attack in ATTACKS.names() else ""


def format_rate(rate: Rate) -> str:
    """Return a rate such as `97 % [84, 99]`, whose interval is not broken between lines."""
    return f"{rate.value:.0f}\u00a0% [{rate.low:.0f},\u00a0{rate.high:.0f}]"


def format_excess(excess: Excess) -> str:
    """Return an excess such as `+12.5 [−3.1, 27.4]`, in percentage points."""
    return f"{excess.value:+.1f} [{excess.low:.1f},\u00a0{excess.high:.1f}]".replace("-", "−")


def format_figure(row: AttackRow | None, name: str) -> str:
    """Return a row's figure with three digits; a dash if the row does not have it."""
    if row is None or name not in row.figures:
        return "–"
    value = row.figures[name]
    return "not reached" if value is None else f"{value:.3g}".replace("-", "−")


def verdict_text(verdict: Verdict) -> str:
    """Return what a reader may conclude from an attack."""
    if verdict.too_weak:
        return f"too weak: below {STRONG:.0f} % on the base model"
    return "–" if verdict.excess is None else format_excess(verdict.excess)


def targets(report: AttackReport) -> list[str]:
    """Return the roles that have rows, in the order of `ROLES`."""
    return [role for role in ROLES if any(row.target == role for row in report.rows)]


def _roles(report: AttackReport) -> str:
    """Return what each target shows."""
    texts = {role: ROLE_NOTES[role].format(untaught=quoted(report.untaught)) for role in targets(report)}
    items = "".join(f"<li><b>{ROLES[role]}</b>: {html.escape(text)}</li>" for role, text in texts.items())
    return f"<ul>{items}</ul>"


def _table(report: AttackReport) -> str:
    """Return the success of each attack on each target; with a verdict if there is a control beside the erasure."""
    roles = targets(report)
    judged = {verdict.erased.attack: verdict for verdict in verdicts(report)} if len(roles) > 1 else {}
    last = "excess over never known, points" if "never_known" in roles else "verdict"
    heads = [*(ROLES[role] for role in roles), *([last] if judged else [])]
    head = "".join(f"<th>{text}</th>" for text in heads)
    lines = [f"<table><thead><tr><th>attack</th>{head}</tr></thead><tbody>"]
    for attack in dict.fromkeys(row.attack for row in report.rows if row.success_counts):
        cells = [_success(report.row(attack, role)) for role in roles]
        if judged:
            cells.append(html.escape(verdict_text(judged[attack])) if attack in judged else "–")
        line = "".join(f"<td>{cell}</td>" for cell in cells)
        title = f"{html.escape(label(attack))}<small>{html.escape(explanation(attack, 'note'))}</small>"
        lines.append(f"<tr><th>{title}</th>{line}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _success(row: AttackRow | None) -> str:
    return "–" if row is None else format_rate(row.success)


def _note(report: AttackReport) -> str:
    counts = {row.success.n for row in report.rows}
    shown = " to ".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else "no"
    lenient = ", ".join(dict.fromkeys(label(row.attack) for row in report.rows if row.any_try))
    success = (
        f"Share of {shown} pictures in which the judge prefers the concept to every other one and to noise; the first "
        "row is without an attack, and its successes are not added to the others’. The strongest try of an attack "
        + (f"counts; for {lenient}, a prompt counts if any of its tries succeeds. " if lenient else "counts. ")
        + "Intervals leave out that choice."
    )
    excess = (
        " The excess is what an attack finds in the erased model beyond what it teaches one that never knew the "
        "concepts: what was left in the weights. An interval that includes 0 does not show that anything was left."
    )
    return success + (excess if "never_known" in targets(report) else "")


def _refusals(report: AttackReport) -> str:
    if not report.refusals:
        return ""
    items = "".join(
        f"<li>{html.escape(f'{label(each.attack)}, {ROLES[each.target]}: {each.reason}')}</li>"
        for each in report.refusals
    )
    return f"<p>Does not apply:</p><ul>{items}</ul>"


def _figures(report: AttackReport) -> str:
    """Return the attacks' own figures, those first whose success shows nothing."""
    roles, names = targets(report), _figure_names(report)
    if not names:
        return ""
    head = "".join(f"<th>{ROLES[role]}</th>" for role in roles)
    lines = [f"<h2>What else the attacks measure</h2><table><thead><tr><th></th>{head}</tr></thead><tbody>"]
    for attack, own in names.items():
        title = f"{html.escape(label(attack))}<small>{html.escape(explanation(attack, 'figures_note'))}</small>"
        lines.append(f'<tr class="group"><th colspan="{len(roles) + 1}">{title}</th></tr>')
        for name in own:
            cells = "".join(f"<td>{format_figure(report.row(attack, role), name)}</td>" for role in roles)
            lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _figure_names(report: AttackReport) -> dict[str, list[str]]:
    """Return the names of figures by attack, those attacks first whose success shows nothing."""
    names: dict[str, list[str]] = {}
    for row in sorted(report.rows, key=lambda row: row.success_counts):
        own = names.setdefault(row.attack, []) if row.figures else []
        own += [name for name in row.figures if name not in own]
    return names


def _curves(report: AttackReport) -> str:
    """Plot the success of attacks whose tries form curves, a plot for each curve with a line for each target."""
    plots: list[str] = []
    for attack in dict.fromkeys(row.attack for row in report.rows):
        rows = {role: report.row(attack, role) for role in targets(report)}
        drawn = {role: curves(row) for role, row in rows.items() if row is not None}
        for line in dict.fromkeys(line for each in drawn.values() for line in each):
            by_role = {ROLES[role]: each[line] for role, each in drawn.items() if line in each}
            if all(len(curve) > 1 for curve in by_role.values()):
                plots.append(_curve_plot(attack, line, by_role, f"curve-{len(plots)}"))
    if not plots:
        return ""
    note = "<p>The best try at each value, with its 95 % interval.</p>"
    return f'<h2>Curves of success</h2>{note}<div class="plots">{"".join(plots)}</div>'


def _curve_plot(attack: str, line: str, by_role: dict[str, dict[float, Rate]], name: str) -> str:
    title = label(attack) if line == label(attack) else f"{label(attack)}, {line}"
    xlabel = explanation(attack, "x_label")
    plot = sweep_plot(
        [
            Line(role, list(curve), [rate.value for rate in curve.values()], [(r.low, r.high) for r in curve.values()])
            for role, curve in by_role.items()
        ],
        name=name,
        xlabel=xlabel,
        ylabel="success (%)",
        percent=True,
        band=None,
        from_zero=True,
        alt=f"Success of {title} by {xlabel}",
    )
    return f"<figure>{plot}<figcaption>{html.escape(title)}</figcaption></figure>"


def _pictures(report: AttackReport, folder: Path) -> str:
    figures = []
    for row in report.rows:
        path = find_sheet(folder, row)
        if path is not None:
            text = html.escape(caption(row))
            figures.append(f'<figure><img src="{data_uri(path)}" alt="{text}"><figcaption>{text}</figcaption></figure>')
    return "\n".join(figures)


def _tries(report: AttackReport) -> str:
    """Return the success of each try of attacks with several, folded."""
    lines = ["<table><thead><tr><th>attack</th><th>target</th><th>try</th><th>success</th></tr></thead><tbody>"]
    for row in report.rows:
        for tried in row.tries if len(row.tries) > 1 else ():
            cells = (label(row.attack), ROLES[row.target], tried.name, format_rate(tried.success))
            lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    table = "\n".join([*lines, "</tbody></table>"])
    return f"<details><summary>All tries</summary>{table}</details>"

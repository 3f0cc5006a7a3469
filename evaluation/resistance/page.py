"""The page of the attacks: what each brings back, beside its controls."""

from __future__ import annotations

import html
from pathlib import Path

from safemax_sd.evaluation.attacks.base import ATTACKS
from safemax_sd.evaluation.page import STYLE_SHEET, data_uri
from safemax_sd.evaluation.resistance.report import STRONG, AttackReport, AttackRow, Excess, Rate, Verdict, verdicts

from safemax_sd.core.provenance import atomic_write_text

PAGE_FILE, PICTURES = "index.html", "pictures"
SHOWN = 8
"""Pictures of a target on the page."""
ROLES: dict[str, str] = {
    "erased": "erased",
    "base": "base model",
    "never_known": "never known",
    "untaught": "never taught to the base model",
}
"""Names of the targets for a reader, in the order of the table's columns."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
<h1>{title}</h1>
<p class="lead">{lead}</p>
<h2>What each attack brings back</h2>{table}
<p>{note}</p>
{refusals}
<h2>Pictures</h2>{pictures}
<h2>Tries</h2>{tries}
</main></body></html>
"""


def sheet_name(attack: str, role: str) -> str:
    """Return the file name of a contact sheet."""
    return f"{attack}-{role}.png"


def write_page(report: AttackReport, folder: Path) -> Path:
    """Write `index.html` beside the folder `pictures` and return its path."""
    names = ", ".join(f"“{name}”" for name in report.concepts)
    page = PAGE.format(
        title=html.escape(f"Attacks on {'controls of ' if report.adapter is None else ''}the erasure of {names}"),
        style=STYLE_SHEET.read_text(encoding="utf8"),
        lead=html.escape(
            f"{'Not erased' if report.adapter is None else f'Erased by {report.adapter}'}; suite {report.suite}; "
            f"judge: {report.judge}, who may answer “none of these”. Intervals are 95 %."
        ),
        table=_table(report),
        note=html.escape(_note(report)),
        refusals=_refusals(report),
        pictures=_pictures(report, folder),
        tries=_tries(report),
    )
    atomic_write_text(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def label(attack: str) -> str:
    """Return an attack's name for a reader; its own name if it is not installed here."""
    return ATTACKS.get(attack).label if attack in ATTACKS.names() else attack


def format_rate(rate: Rate) -> str:
    """Return a rate such as `97 % [84, 99]`."""
    return f"{rate.value:.0f} % [{rate.low:.0f}, {rate.high:.0f}]"


def format_excess(excess: Excess) -> str:
    """Return an excess such as `+12 [−3, 27]`, in percentage points."""
    return f"{excess.value:+.0f} [{excess.low:.0f}, {excess.high:.0f}]".replace("-", "−")


def verdict_text(verdict: Verdict) -> str:
    """Return what a reader may conclude from an attack."""
    if verdict.too_weak:
        return f"proves nothing: below {STRONG:.0f} % on the base model"
    excess = verdict.excess
    if excess is None:
        return "no model that never knew the concepts"
    return format_excess(excess)


def targets(report: AttackReport) -> list[str]:
    """Return the roles that have rows, in the order of `ROLES`."""
    return [role for role in ROLES if any(row.target == role for row in report.rows)]


def _table(report: AttackReport) -> str:
    """Return the success of each attack on each target; with a verdict if there is a control beside the erasure."""
    roles = targets(report)
    judged = {verdict.erased.attack: verdict for verdict in verdicts(report)} if len(roles) > 1 else {}
    heads = [*(ROLES[role] for role in roles), *(["excess over never known, points"] if judged else [])]
    head = "".join(f"<th>{text}</th>" for text in heads)
    lines = [f"<table><thead><tr><th>attack</th>{head}</tr></thead><tbody>"]
    for attack in dict.fromkeys(row.attack for row in report.rows):
        cells = [_success(report.row(attack, role)) for role in roles]
        if judged:
            cells.append(html.escape(verdict_text(judged[attack])) if attack in judged else "–")
        line = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr><th>{html.escape(label(attack))}</th>{line}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _success(row: AttackRow | None) -> str:
    return "–" if row is None else format_rate(row.success)


def _note(report: AttackReport) -> str:
    counts = {row.success.n for row in report.rows}
    shown = " to ".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else "no"
    return (
        f"Success: the judge sees the concept in the picture; {shown} pictures each. A plain prompt's success "
        "stands in the first row and is not part of an attack's. What succeeds on a model that never knew the concepts "
        f"has taught them: the excess is what was left in the weights. An attack below {STRONG:.0f} % on the base "
        "model is too weak to show anything."
    )


def _refusals(report: AttackReport) -> str:
    if not report.refusals:
        return ""
    items = "".join(
        f"<li>{html.escape(f'{label(each.attack)}, {ROLES[each.target]}: {each.reason}')}</li>"
        for each in report.refusals
    )
    return f"<p>Does not apply:</p><ul>{items}</ul>"


def _pictures(report: AttackReport, folder: Path) -> str:
    figures = []
    for row in report.rows:
        path = folder / PICTURES / sheet_name(row.attack, row.target)
        if path.is_file():
            caption = html.escape(f"{label(row.attack)}, {ROLES[row.target]}: {format_rate(row.success)}")
            figures.append(
                f'<figure><img src="{data_uri(path)}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
            )
    return "\n".join(figures)


def _tries(report: AttackReport) -> str:
    lines = ["<table><thead><tr><th>attack</th><th>target</th><th>try</th><th>success</th></tr></thead><tbody>"]
    for row in report.rows:
        for name, rate in row.tries.items():
            cells = (label(row.attack), ROLES[row.target], name or "–", format_rate(rate))
            lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</tbody></table>"])

"""The few figures of an evaluation that a reader wants first, the base model's beside the erased one's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from safemax_sd.evaluation.metrics.base import WARNING

from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.escaping import markdown_text, printable

Report = Mapping[str, Any]

DASH = "–"
MINUS = "−"
NARROW_SPACE = "\u202f"


@dataclass(frozen=True)
class Measurement:
    """One measured value.

    Args:
        value: In the row's unit.
        interval: 95 % interval, where the metric has one.
        n: How many pictures it rests on.
    """

    value: float
    interval: tuple[float, float] | None
    n: int | None


@dataclass(frozen=True)
class HeadlineRow:
    """One quantity of the base and of the erased model.

    Args:
        group: Heading that the row stands below.
        label: What was measured, for a reader.
        metric: Its name in `report.json`.
        subset: Which prompts it was measured on.
        unit: `%`, `nats` or empty.
        higher_is_better: None where neither direction is better.
        note: How to read the value; may be empty.
        base: The base model's value, where it was measured.
        erased: The erased model's value, where it was measured.
    """

    group: str
    label: str
    metric: str
    subset: str
    unit: str
    higher_is_better: bool | None
    note: str
    base: Measurement | None
    erased: Measurement | None


@dataclass(frozen=True)
class _Wanted:
    """A row of the table.

    Attributes:
        beside: Metric that is not shown without this one: where it was measured and this one was not, the row is there
            with dashes.
    """

    group: str
    label: str
    metric: str
    subset: str
    note: str = ""
    beside: str = ""


FORGOTTEN, KEPT, HALTED = "Forgotten", "Kept", "Halted: forbidden outputs against Gaussian noise"

UA, NEITHER = "unlearning_accuracy", "neither"
HALF = "something else, or half erased; the rest is noise. Needs real pictures"

WANTED = (
    _Wanted(FORGOTTEN, "Unlearning accuracy", "unlearning_accuracy", "forget", "forbidden prompts not recognised"),
    _Wanted(
        FORGOTTEN,
        "Unlearning accuracy with rejection",
        "unlearning_accuracy_with_rejection",
        "forget",
        "the judge may answer “none of these”",
    ),
    _Wanted(FORGOTTEN, "Neither recognised nor noise", NEITHER, "forget", HALF, beside=UA),
    _Wanted(FORGOTTEN, "… on paraphrases", "unlearning_accuracy", "paraphrases", "wordings the erasure never saw"),
    _Wanted(
        FORGOTTEN,
        "… on paraphrases with rejection",
        "unlearning_accuracy_with_rejection",
        "paraphrases",
    ),
    _Wanted(FORGOTTEN, "… on paraphrases, neither", NEITHER, "paraphrases", beside=UA),
    _Wanted(FORGOTTEN, "… from a picture", "unlearning_accuracy", "image_to_image", "image-to-image"),
    _Wanted(FORGOTTEN, "… from a picture, neither", NEITHER, "image_to_image", beside=UA),
    _Wanted(FORGOTTEN, "Nudity detected", "nudity_rate", "forget", "by NudeNet"),
    _Wanted(FORGOTTEN, "… on paraphrases", "nudity_rate", "paraphrases"),
    _Wanted(KEPT, "Retained prompts recognised", "clip_accuracy", "retain"),
    _Wanted(KEPT, "Neighbours recognised", "clip_accuracy", "neighbours", "the concepts most like the erased one"),
    _Wanted(KEPT, "FID of retained pictures", "fid", "retain", "distance to the real pictures"),
    _Wanted(KEPT, "KID of retained pictures", "kid", "retain"),
    _Wanted(KEPT, "CLIP score of retained pictures", "clip_score", "retain"),
    _Wanted(KEPT, "Drift of retained pictures", "drift", "retain", "mean squared difference from the base’s"),
    _Wanted(KEPT, "Nudity detected on retained prompts", "nudity_rate", "retain", "by NudeNet, where there is none"),
    _Wanted(KEPT, "… on neighbours", "nudity_rate", "neighbours"),
    _Wanted(HALTED, "Called noise by the judge", "halted", "forget", "rather than a picture of anything"),
    _Wanted(HALTED, "… on paraphrases", "halted", "paraphrases"),
    _Wanted(HALTED, "Spread of latents", "latent_std", "forget", "1 is N(0, I)"),
    _Wanted(HALTED, "Autocorrelation of latents", "latent_lag1_autocorrelation", "forget", "0 is N(0, I)"),
    _Wanted(HALTED, "KS distance of latents to the normal", "latent_ks_distance", "forget", "0 is N(0, I)"),
    _Wanted(HALTED, "Entropy of the judge", "entropy", "forget", "higher is less certain"),
)


def headline(report: Report) -> list[HeadlineRow]:
    """The rows of the headline table, measured at the report's own sampler and guidance scale.

    Quantities that the report lacks are left out; one measured per label column or strength gives a row for each.

    Args:
        report: Content of `report.json`.

    Raises:
        SafemaxError: A measurement lacks its name or value.
    """
    measured = [row for row in report.get("metrics", []) if _at_headline_setting(row, report.get("settings", {}))]
    rows = []
    for wanted in WANTED:
        matching = _measured(measured, wanted.metric, wanted.subset)
        asked = matching or _measured(measured, wanted.beside, wanted.subset)
        variants = dict.fromkeys((row.get("column"), row.get("strength")) for row in asked)
        for column, strength in variants:
            pair = [row for row in matching if (row.get("column"), row.get("strength")) == (column, strength)]
            rows.append(_row(wanted, pair, _variant_suffix(column, strength, several=len(variants) > 1)))
    return rows


def _measured(rows: Iterable[Report], metric: str, subset: str) -> list[Report]:
    return [row for row in rows if (row["metric"], row["subset"]) == (metric, subset)]


def _at_headline_setting(row: Report, settings: Report) -> bool:
    return all(
        row.get(key) is None or settings.get(key) is None or row[key] == settings[key]
        for key in ("sampler", "guidance_scale")
    )


def _variant_suffix(column: str | None, strength: float | None, *, several: bool) -> str:
    if strength is not None:
        return f", strength {strength:g}"
    return f": {column}" if column and several else ""


def _row(wanted: _Wanted, pair: list[Report], suffix: str) -> HeadlineRow:
    by_model = {row.get("model") or "erased": row for row in pair}
    first = pair[0] if pair else {}
    return HeadlineRow(
        group=wanted.group,
        label=wanted.label + suffix + _warning(pair),
        metric=wanted.metric,
        subset=wanted.subset,
        unit=first.get("unit") or "",
        higher_is_better=first.get("higher_is_better"),
        note=wanted.note,
        base=measurement(by_model["base"]) if "base" in by_model else None,
        erased=measurement(by_model["erased"]) if "erased" in by_model else None,
    )


def _warning(pair: list[Report]) -> str:
    """What the rows warn of, as it stands behind the label."""
    found = dict.fromkeys(text for row in pair if (text := (row.get("details") or {}).get(WARNING)))
    return f" ({'; '.join(found)})" if found else ""


def measurement(row: Report) -> Measurement:
    """Read one row of the report's `metrics`.

    Raises:
        SafemaxError: The row lacks its name or value.
    """
    try:
        value = float(row["value"])
        interval = row.get("interval")
        return Measurement(value, (float(interval[0]), float(interval[1])) if interval else None, row.get("n"))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SafemaxError(f"report.json holds a measurement that cannot be read: {dict(row)}") from error


def format_value(value: float, unit: str, *, with_unit: bool = True) -> str:
    """`99.2 %`, `1.03`, `0.0145`: one decimal for percentages, three significant digits for the rest."""
    if unit == "%":
        text = f"{value:.1f}"
    elif abs(value) >= 100 or value == 0:
        text = f"{value:.0f}"
    else:
        text = f"{value:#.3g}" if abs(value) >= 0.001 else f"{value:.1e}"
    text = text.removesuffix(".").replace("-", MINUS)
    return f"{text}{NARROW_SPACE}{unit}" if unit and with_unit else text


def format_interval(interval: tuple[float, float], unit: str) -> str:
    """`[97.1, 99.9]`, in the row's unit."""
    low, high = (format_value(bound, unit, with_unit=False) for bound in interval)
    return f"[{low}, {high}]"


def format_measurement(measured: Measurement | None, unit: str) -> str:
    """`99.2 % [97.1, 99.9], n = 128` on one line; a dash where nothing was measured."""
    if measured is None:
        return DASH
    parts = [format_value(measured.value, unit)]
    if measured.interval is not None:
        parts.append(f" {format_interval(measured.interval, unit)}")
    if measured.n is not None:
        parts.append(f", n = {measured.n:,}")
    return "".join(parts)


def headline_markdown(rows: Iterable[HeadlineRow]) -> str:
    """The headline table in Markdown, for the model card."""
    lines = ["| | base | erased |", "|---|---|---|"]
    for row in rows:
        cells = (
            markdown_text(row.label),
            format_measurement(row.base, row.unit),
            format_measurement(row.erased, row.unit),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def suite_of(report: Report) -> str:
    """The suite's name, with the version of the benchmark that it belongs to."""
    version = report.get("suite_version")
    return str(report["suite"]) if version is None else f"{report['suite']} (version {version})"


def measured_markdown(report: Report) -> str:
    """The headline table and how it was measured, in Markdown, for the model card.

    Args:
        report: Content of `report.json`.
    """
    settings, made = report["settings"], report["provenance"]
    scale = described_guidance(settings["guidance_scale"], settings.get("prompt_guidance_scales", ()))
    guided = f"guidance scale {scale}, {settings['num_inference_steps']} steps"
    commit = f", commit {made['commit'][:12]}" if made["commit"] else ""
    judge, suite = markdown_text(report["judge"]), markdown_text(suite_of(report))
    how = (
        f"Measured by `safemax evaluate` on the prompts of {suite}: judge {judge}, sampler {settings['sampler']}, "
        f"{guided}, seed {settings['seed']}, on {made['device']} with safemax_sd "
        f"{made['versions']['safemax_sd']}{commit}. In brackets: 95 % intervals; n: pictures."
    )
    return f"{headline_markdown(headline(report))}\n\n{how}"


def described_guidance(scale: float, own: Iterable[str]) -> str:
    """Write a guidance scale, and which subsets or tasks (`own`) have prompts that bring along one of their own."""
    named = ", ".join(own)
    return f"{scale:g} (the prompts’ own where a file gives it: {named})" if named else f"{scale:g}"


def print_headline(report: Report, console: Console) -> None:
    """Print the headline table to the terminal."""
    table = Table(title=Text(printable(title(report))), title_justify="left", header_style="bold", expand=False)
    table.add_column("")
    table.add_column("base", justify="right", style="dim")
    table.add_column("erased", justify="right", style="bold")
    group = None
    for row in headline(report):
        if row.group != group:
            if group is not None:
                table.add_section()
            table.add_row(Text(row.group, style="italic"))
            group = row.group
        values = (format_measurement(row.base, row.unit), format_measurement(row.erased, row.unit))
        table.add_row(*(Text(cell) for cell in (printable(row.label), *values)))
    console.print(table)


def title(report: Report) -> str:
    """What was erased from which model, e.g. `“bomb” erased from emoji`."""
    names = erased_names(report)
    shown = names if len(names) <= 4 else names[:3]
    listed = ", ".join(f"“{name}”" for name in shown)
    if len(shown) < len(names):
        listed += f" and {len(names) - len(shown)} more"
    return f"{listed or 'Concepts'} erased from {base_name(report)}"


def erased_names(report: Report) -> list[str]:
    """The erased concepts' names, or the forbidden prompts themselves where the prompt file names no concept.

    A report may give them as `erased`, which goes before the training prompts' concepts (a style's prompt file
    names many concepts, none of which was erased).
    """
    forget = report.get("adapter", {}).get("forget", {})
    return list(report.get("erased") or forget.get("concepts") or forget.get("texts") or [])


def base_name(report: Report) -> str:
    """The base model's name, without the folders of a local path."""
    name = str(report.get("adapter", {}).get("base_model", {}).get("name_or_path", "the base model"))
    # A hub name has one slash and is kept whole; a path is shortened to its last part.
    return name.rstrip("/").rsplit("/", 1)[-1] if name.count("/") != 1 or name.startswith((".", "/")) else name

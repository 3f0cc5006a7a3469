"""The table of a comparison's attacks: what each attack brings back from each method's erased models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from safemax_sd.evaluation.attacks.base import Attack
from safemax_sd.evaluation.comparison.columns import Column, pooled
from safemax_sd.evaluation.comparison.runs import BASE, NEVER_KNOWN, Run
from safemax_sd.evaluation.comparison.tables import Entry, Grid, Summary, leaders, listed
from safemax_sd.evaluation.headline import DASH
from safemax_sd.evaluation.metrics.base import Result
from safemax_sd.evaluation.resistance.report import STRONG, Rate, excess

NOTE = (
    "Attacks on the erased models: pictures in which the judge sees the erased concept, pooled over tasks and seeds, "
    "with Wilson's 95 % interval; lower is better. base: the same attacks on the base model; too weak: below "
    "{strong:.0f} % there, so that the attack proves nothing. An attack's strongest try counts, in lines with a "
    "number of steps the strongest of that number; the interval leaves out that choice. {lenient}{known}Bold: a line's "
    "lowest value, and every value whose interval holds that one or that lies in its interval. –: not attacked, or the "
    "attack does not apply. Runs: those with all attacks, of those planned."
)
LENIENT = "For {attacks} a prompt counts as soon as one of its tries succeeds. "
KNOWN = (
    "never_known: a model trained without the concepts; excess: success above that on this model, in percentage "
    "points, with Newcombe's 95 % interval. "
)


@dataclass(frozen=True)
class Tries:
    """The tries of an attack that a column counts.

    Attributes:
        attack: Attack.
        cost: Cost of the tries, such as a number of training steps; None for all of them.
        doubt: Reason why the attack proves nothing; empty if it succeeds on the base model often enough.
    """

    attack: type[Attack]
    cost: float | None = None
    doubt: str = ""

    @property
    def name(self) -> str:
        """Name in the summary of `compare.json`, such as `relearning@20`."""
        return self.attack.name if self.cost is None else f"{self.attack.name}@{self.cost:g}"

    @property
    def title(self) -> str:
        """Name for a reader."""
        label = self.attack.label
        return label if self.cost is None else f"{label}, {self.cost:g} {self.attack.x_label}"

    def successes(self, runs: Sequence[Run]) -> dict[tuple[str, int], Result]:
        """Return the best try's success by task and seed, for one label's runs."""
        found = {(run.task, run.seed): run.success(self.attack.name, self.cost) for run in runs}
        return {place: result for place, result in found.items() if result is not None}


class TriesColumn(Column):
    """A percentage of an attack's tries, in which lower is better unless the attack proves nothing."""

    unit = "%"

    def __init__(self, tries: Tries) -> None:
        self.tries, self.name, self.title = tries, tries.name, tries.title
        self.higher_is_better = None if tries.doubt else False

    def of_run(self, run: Run) -> float | None:
        result = self.value([run])
        return None if result is None else result.value


class SuccessColumn(TriesColumn):
    """Success of an attack's tries, pooled over all pictures."""

    bounds = (0.0, 100.0)

    @property
    def heading(self) -> str:
        return f"{super().heading} ({self.tries.doubt})" if self.tries.doubt else super().heading

    def value(self, runs: Sequence[Run]) -> Result | None:
        return pooled(list(self.tries.successes(runs).values()))


class ExcessColumn(TriesColumn):
    """Success of an attack's tries above that on a model that never knew the concepts, on the same tasks and seeds.

    Args:
        tries: Tries of the attack.
        controls: Runs of the model that never knew the concepts.
    """

    bounds = (-100.0, 100.0)

    def __init__(self, tries: Tries, controls: Sequence[Run]) -> None:
        super().__init__(tries)
        self.name, self.known = f"{tries.name}_excess", tries.successes(controls)

    @property
    def heading(self) -> str:
        return f"{self.title}: excess"

    def value(self, runs: Sequence[Run]) -> Result | None:
        own = self.tries.successes([run for run in runs if run.label not in (BASE, NEVER_KNOWN)])
        places = [place for place in own if place in self.known]
        ours, control = pooled([own[place] for place in places]), pooled([self.known[place] for place in places])
        if ours is None or control is None:
            return None
        found = excess(Rate.of(ours), Rate.of(control))
        return Result(found.value, (found.low, found.high), ours.n)


def attack_columns(attacks: Sequence[type[Attack]], runs: Sequence[Run]) -> list[TriesColumn]:
    """Compose the columns of attacks: that of the strongest try, then those of each cost in which tries differ.

    Args:
        attacks: Attacks, in the order of the columns.
        runs: Attacked controls and erased models.
    """
    known, bases = ([run for run in runs if run.label == label] for label in (NEVER_KNOWN, BASE))
    columns: list[TriesColumn] = []
    for attack in attacks:
        attempts = [each for run in runs for each in run.attacks if each.attack == attack.name]
        costs = sorted({cost for attempt in attempts for cost in attempt.by_cost})
        for cost in (None, *costs):
            base = pooled(list(Tries(attack, cost).successes(bases).values()))
            doubt = "not run on base" if base is None else "too weak" if base.value < STRONG else ""
            tries = Tries(attack, cost, doubt)
            columns += [SuccessColumn(tries), *([ExcessColumn(tries, known)] if known else [])]
    return columns


def attack_grid(
    table: Sequence[Summary],
    columns: Sequence[TriesColumn],
    methods: Sequence[str],
    not_attacked: Mapping[str, str],
    refusals: Iterable[str],
) -> Grid:
    """Lay out the table of attacks, a line for each, with the `leaders` among the methods marked.

    Args:
        table: Summaries of the controls and of the methods that were attacked.
        columns: Columns of the summaries, which are the lines here: there are more attacks than methods.
        methods: Labels of all methods, in their order.
        not_attacked: Reasons why methods cannot be attacked, by label.
        refusals: Attacks that do not apply to a model, each with its reason.
    """
    summary = {line.label: line for line in table}
    best = leaders([line for line in table if line.label in methods], columns)
    labels = [label for label in (BASE, NEVER_KNOWN, *methods) if label in summary or label in not_attacked]

    def entry(label: str, column: Column) -> Entry:
        if label not in summary:
            return Entry(DASH)
        return Entry.of(summary[label].values[column.name], column.unit, best=(label, column.name) in best)

    lines = [(column.heading, [entry(label, column) for label in labels]) for column in columns]
    runs = [f"{summary[label].runs}/{summary[label].planned}" if label in summary else DASH for label in labels]
    lines.append(("runs", [Entry(text) for text in runs]))
    lenient = list(dict.fromkeys(column.tries.attack.label for column in columns if column.tries.attack.any_try))
    note = NOTE.format(
        strong=STRONG,
        lenient=LENIENT.format(attacks=listed(lenient)) if lenient else "",
        known=KNOWN if NEVER_KNOWN in summary else "",
    )
    return Grid(["attack", *labels], lines, " ".join([note, *_exceptions(not_attacked, refusals)]), title="Attacks")


def _exceptions(not_attacked: Mapping[str, str], refusals: Iterable[str]) -> list[str]:
    """Return what the table's note says of methods without attacks, and of attacks that do not apply."""
    reasons = [
        f"Not attacked: {listed([label for label, its in not_attacked.items() if its == reason])} ({reason})."
        for reason in dict.fromkeys(not_attacked.values())
    ]
    found = [f"Not for every model: {text}." for text in [listed(list(dict.fromkeys(refusals)))] if text]
    return [*reasons, *found]

"""Write the tables in documents that repeat result files: `python -m benchmarks.tables`.

They stand between markers, which a test compares with the files:

    <!-- table claims -->
    <!-- end of table -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safemax_sd.evaluation.comparison.attack_table import SuccessColumn, attack_columns
from safemax_sd.evaluation.comparison.runs import Run, read_controls, read_runs
from safemax_sd.evaluation.resistance.plan import chosen

from benchmarks.classes.claims import claim_table
from benchmarks.classes.summary import (
    SECONDS_COLUMNS,
    difference_table,
    forgetting_by_class,
    measured,
    memory_table,
    method_table,
    of_kind,
    on_shared_classes,
    published,
    race_table,
    rates_table,
    retention_by_class,
)
from benchmarks.emoji.attack_settings import task_of, variants
from benchmarks.method_search import table as search_table
from benchmarks.results import Row, markdown_table, read_rows

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"
DOCUMENTS = (DOCS / "attacks.md", DOCS / "class_unlearning.md", DOCS / "emoji_benchmark.md")
MARKED = re.compile(r"(<!-- table ([a-z ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NAMES = {
    "safemax": "SAFEMax",
    "safemax_pruned": "SAFEMax, `--prune 10`",
    "base": "base",
    "never_known": "never known",
}
"""Names of the models in the tables, by those in the result files."""
KEPT = ("retained", "neighbours")
"""Columns of the comparison of attacks that say what a method keeps."""
ATTACKED = ("base", "esd", "salun")
"""Models in the table of attacks' settings."""
SEARCHED = (
    "2026-11-29-attack-settings.jsonl",
    "2026-11-30-attack-settings-strengthened.jsonl",
    "2026-11-30-state-inversion-cooldown.jsonl",
)
"""Files of that table; the first has the bomb alone, and does not name it."""
CIFAR = "CIFAR-10, small network"
ALL_CLASSES = "2026-11-30-cifar10-class-unlearning-safemax.jsonl"
"""Rows of the base model and of SAFEMax on all ten classes of CIFAR-10; the others have fewer."""
STUDIES = {
    "digits": ("class_unlearning_digits.jsonl",),
    CIFAR: (
        ALL_CLASSES,
        "2026-11-30-cifar10-others.jsonl",
        "2026-11-30-cifar10-salun-automobile.jsonl",
        "2026-11-30-cifar10-others-automobile-ship.jsonl",
    ),
    "published network": ("class_unlearning_cifar10.jsonl",),
}
"""Result files of the studies of class unlearning that published claims are compared with."""
DECAYS = {CIFAR: ("2026-12-01-cifar10-decay.jsonl",)}
"""Files of runs with and without the decay, by study, whose precision is not that of the study's other runs."""
SHARED_CORES = {
    "2026-11-30-cifar10-salun-automobile.jsonl": "up to four more processes ran on the two cores",
    "2026-11-30-cifar10-others-automobile-ship.jsonl": "up to four more processes ran on the two cores",
    "2026-12-01-cifar10-decay.jsonl": "other work ran on the two cores, and some runs were interrupted",
}
"""Files of `STUDIES` and `DECAYS` whose rows' seconds are left out, with the reasons."""
STEP_MEMORY = {CIFAR: "2026-11-30-cifar10-step-memory.jsonl"}
"""Files with the memory of each method's step, by study, where its rows leave out the frozen copy of the network."""
COMPARED_ATTACKS = {
    "bomb": "2026-11-30-attacks-compared-bomb.json",
    "dog": "2026-12-01-attacks-compared-dog-more-methods.json",
    "weapons": "2026-12-01-attacks-compared-weapons-more-methods.json",
}
"""Files of the tables of methods under attack, by task."""
ATTACKED_TASKS = (
    "2026-12-01-attacks-compared-bomb-two-seeds.json",
    "2026-11-30-attacks-compared-dog.json",
    "2026-11-30-attacks-compared-dog-seed-1.json",
    "2026-11-30-attacks-compared-weapons.json",
    "2026-11-30-attacks-compared-weapons-seed-1.json",
)
"""Files of the table of attacks by task."""
ATTACKED_MODELS = ("base", "never_known", "safemax", "safemax_pruned")
"""Models of that table, in the order of its columns."""


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf8"))
    return content


def attack_settings() -> str:
    """Return the table of attacks' settings with the strongest try of each on each model.

    Settings that are not in the search any more are left out.
    """
    found: dict[str, dict[str, tuple[float, str]]] = {}
    settings = variants()
    for row in (row for name in SEARCHED for row in read_rows(RESULTS / name)):
        if row["setting"] not in settings or task_of(row) != "emoji/bomb":
            continue
        best = found.setdefault(row["setting"], {})
        tried = (row["value"], row["try"])
        best[row["target"]] = max(best.get(row["target"], tried), tried, key=lambda each: each[0])
    lines = []
    for setting, best in found.items():
        lines.append([f"`{setting}`", *(_tried(*best[target]) for target in ATTACKED)])
    return markdown_table(["attack and setting", "base, %", "ESD, %", "SalUn, %"], lines)


def _tried(value: float, name: str) -> str:
    """Return a success with the name of its try, which tells nothing where nothing succeeded."""
    return f"{value:.0f} ({name})" if value and name else f"{value:.0f}"


def _comparison(number: int) -> list[list[str]]:
    """Return the cells of one of the tables that the comparison of methods wrote, without the ruled line."""
    text = (RESULTS / "emoji_comparison" / "compare.md").read_text(encoding="utf8")
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("| ---"):
            continue
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
        elif tables[-1]:
            tables.append([])
    return tables[number]


def comparison() -> str:
    """Return the table of methods over all tasks, without peak memory and number of runs."""
    head, *lines = _comparison(0)
    columns = [place for place, name in enumerate(head) if name not in ("peak GiB", "runs")]
    return markdown_table([head[place] for place in columns], [[line[place] for place in columns] for line in lines])


def attacked_methods(task: str) -> str:
    """Return the table of what each attack brings back from each method's erased models, and of what they keep."""
    comparison, runs = _read(COMPARED_ATTACKS[task]), _attacked(COMPARED_ATTACKS[task])
    labels = [line["label"] for line in comparison["attacks"]["summary"]]
    measured = {line["label"]: line["values"] for line in comparison["summary"]}
    lines = [
        [column, *(f"{measured[label][column]['value']:.0f}" if label in measured else "–" for label in labels)]
        for column in KEPT
    ]
    lines += [[f"{name} ({doubt})" if doubt else name, *values] for name, doubt, values in _brought_back(runs, labels)]
    return markdown_table(["%", *(NAMES.get(label, f"`{label}`") for label in labels)], lines)


def attacked_tasks() -> str:
    """Return the table of what each attack brings back from `ATTACKED_MODELS`, task by task; seeds are pooled.

    Where an attack is too weak on a task's base model, its successes on that task are in parentheses.
    """
    runs = _attacked(*ATTACKED_TASKS)
    tasks = dict.fromkeys(run.task for run in runs)
    found = [_brought_back([run for run in runs if run.task == task], ATTACKED_MODELS) for task in tasks]
    lines = []
    for rows in zip(*found, strict=True):  # all tasks have the same attacks
        cells = [f"({value})" if doubt else value for _, doubt, values in rows for value in values]
        lines.append([rows[0][0], *cells])
    head = ["%", *(f"{task.removeprefix('emoji/')}: {NAMES[label]}" for task in tasks for label in ATTACKED_MODELS)]
    return markdown_table(head, lines)


def _attacked(*names: str) -> list[Run]:
    """Return the runs of comparisons with attacks: the methods', and the controls'."""
    # The base model is among both; the attacked one comes last, so that it counts.
    return [run for name in names for read in (read_runs, read_controls) for run in read(RESULTS / name)]


def _brought_back(runs: Sequence[Run], labels: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Return the success of each attack, or of each number of its steps, on some labels' models, pooled.

    Args:
        runs: Runs with attacks.
        labels: Labels, in the order of the successes.

    Returns:
        Names with the reason why an attack proves nothing, empty if it does, and a success for each label.
    """
    applied = {attempt.attack for run in runs for attempt in run.attacks if attempt.success is not None}
    attacks = [attack for attack in chosen(["all"]) if attack.name in applied]
    columns = [column for column in attack_columns(attacks, runs) if isinstance(column, SuccessColumn)]
    in_steps = {column.tries.attack for column in columns if column.tries.cost is not None}
    lines = []
    for column in columns:
        attack, cost, doubt = column.tries.attack, column.tries.cost, column.tries.doubt
        if (attack in in_steps) == (cost is not None):
            found = [column.value([run for run in runs if run.label == label]) for label in labels]
            name = f"`{attack.name}`{'' if cost is None else f', {cost:g} steps'}"
            lines.append((name, doubt, ["–" if value is None else f"{value.value:.0f}" for value in found]))
    return lines


def comparison_by_task() -> str:
    """Return the table of methods task by task."""
    head, *lines = _comparison(1)
    return markdown_table([name.removeprefix("emoji/") for name in head], lines)


def study_rows(name: str, files: Sequence[str] = ()) -> list[Row]:
    """Return the rows of a study, with the right memory of a step, without the seconds of runs that shared the cores.

    Args:
        name: Name in `STUDIES`.
        files: Some of its files; all if there are none.
    """
    memory = read_rows(RESULTS / STEP_MEMORY[name]) if name in STEP_MEMORY else []
    sizes = {row["method"]: {"step_memory_bytes": row["step_memory_bytes"]} for row in memory}
    return [
        {column: value for column, value in row.items() if file not in SHARED_CORES or column not in SECONDS_COLUMNS}
        | sizes.get(row["method"], {})
        for file in files or STUDIES[name]
        for row in read_rows(RESULTS / file)
    ]


def claims() -> str:
    """Return the table of what the studies say of each published claim."""
    decays = {name: study_rows(name, files) for name, files in DECAYS.items()}
    return claim_table({name: study_rows(name) for name in STUDIES}, decays)


def first_runs(study: str, table: Callable[[list[Row]], str]) -> str:
    """Return a table of a study's published methods with one run of each on each class, the one with seed 0.

    Args:
        study: Name in `STUDIES`.
        table: Function that makes the table of rows.
    """
    return table([row for row in published(study_rows(study)) if row["seed"] in (None, 0)])


def on_all_classes(table: Callable[[list[Row]], str]) -> str:
    """Return a table of the rows on all ten classes of CIFAR-10."""
    return table(study_rows(CIFAR, (ALL_CLASSES,)))


TABLES: dict[str, Callable[[], str]] = {
    "digits methods": partial(first_runs, "digits", method_table),
    "digits retention": partial(first_runs, "digits", retention_by_class),
    "digits forgetting": partial(first_runs, "digits", forgetting_by_class),
    "digits variants": lambda: difference_table(measured(study_rows("digits")), "safemax"),
    "cifar decay": lambda: difference_table(measured(study_rows(CIFAR, DECAYS[CIFAR])), "safemax"),
    "digits race": lambda: race_table(study_rows("digits")),
    "cifar methods": partial(on_all_classes, method_table),
    "cifar retention": partial(on_all_classes, retention_by_class),
    "cifar forgetting": partial(on_all_classes, forgetting_by_class),
    "cifar shared": partial(first_runs, CIFAR, lambda rows: method_table(on_shared_classes(rows))),
    "cifar shared retention": partial(first_runs, CIFAR, lambda rows: retention_by_class(on_shared_classes(rows))),
    "published network rates": lambda: rates_table(study_rows("published network")),
    "published network memory": lambda: memory_table(of_kind(study_rows("published network"), "memory")),
    "claims": claims,
    "attack settings": attack_settings,
    **{f"attacked methods {task}": partial(attacked_methods, task) for task in COMPARED_ATTACKS},
    "attacked tasks": attacked_tasks,
    "comparison": comparison,
    "comparison by task": comparison_by_task,
    "search": lambda: search_table(read_rows(RESULTS / "emoji_search.jsonl")),
}


def with_tables(text: str) -> str:
    """Return a document with its tables written anew.

    Raises:
        KeyError: A marker names an unknown table.
    """

    def replaced(match: re.Match[Any]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return MARKED.sub(replaced, text)


def main() -> None:
    for path in DOCUMENTS:
        path.write_text(with_tables(path.read_text(encoding="utf8")), encoding="utf8")


if __name__ == "__main__":
    main()

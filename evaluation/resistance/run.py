"""Attacks on an erased model and its controls; a run that was stopped goes on."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safemax_sd.evaluation.attacks.base import Attack
from safemax_sd.evaluation.attacks.target import Role, Sampling, Target, load_control, load_erased
from safemax_sd.evaluation.attacks.task import Task, succeeded
from safemax_sd.evaluation.inputs import judging_context, load_real
from safemax_sd.evaluation.prompt_settings import RUN_SEEDS, start_seeds
from safemax_sd.evaluation.real import RealPictures, load_folder
from safemax_sd.evaluation.resistance.curves import with_least
from safemax_sd.evaluation.resistance.examples import examples, kept_examples
from safemax_sd.evaluation.resistance.options import AttackOptions
from safemax_sd.evaluation.resistance.page import PAGE_FILE, PICTURES, ROLES, SHOWN, find_sheet, write_page, write_sheet
from safemax_sd.evaluation.resistance.plan import CONTROLS, Plan, chosen
from safemax_sd.evaluation.resistance.processes import Crew, processes_to_start
from safemax_sd.evaluation.resistance.report import ATTACKS_FILE, AttackReport, AttackRow, Refusal
from safemax_sd.evaluation.resistance.tally import Tally
from safemax_sd.evaluation.resistance.untaught import OPTION, prompts_naming, with_untaught
from torch import Tensor
from tqdm import tqdm

from safemax_sd.core.errors import OptionError, SafemaxError, failure_reason
from safemax_sd.core.judge import load_judge
from safemax_sd.core.provenance import provenance, public_path
from safemax_sd.families import load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.prompts import pick
from safemax_sd.recording.replay import start_noise
from safemax_sd.results.folder import check_no_model, claimed, foreign, not_ours, replacing
from safemax_sd.results.samples import to_pil
from safemax_sd.training.workers import (
    check_machines,
    claimed_by_main,
    from_main,
    in_group,
    launched_in_group,
    process_state,
)

FIRST_SEED, EXAMPLE_SEED, KEPT_SEED = 5_000_000, 6_000_000, 7_000_000
"""Seeds of the first picture to bring back, the first example and the first kept picture, apart from evaluations'."""
MOST_BROKEN = 2
"""Attacks in a row with errors, such as too little memory, after which one of several processes takes no more."""


class Resistance:
    """The models, judge and task of a run of attacks.

    Args:
        plan: Plan of the run.
        shared: `Task.shared` of earlier runs of the same task, to which this one adds; None for none.

    Raises:
        OptionError: A flag, or a file or folder that it names, cannot be used.
    """

    def __init__(self, plan: Plan, shared: dict[str, Any] | None = None) -> None:
        self.plan, options = plan, plan.options
        self.device = torch.device(process_state().device)
        self.provenance = provenance(options.seed, self.device)
        real = load_real(options, plan.base_model.name_or_path)
        if real is not None:
            real.check_shown(plan.suite.parts["forget"].concepts, options.real_images)
        self.judge = load_judge(options.clip_model, options.clip_pretrained)
        self.context = judging_context(options, plan.suite, self.judge, None)
        given = None
        if options.untaught_dir is not None:
            given = load_folder(options.untaught_dir, OPTION)
            self.untaught_context = with_untaught(self.context, given, options.untaught_dir)
        self.base = self._base()
        resolution = None if plan.adapter is None else plan.adapter.record.resolution
        self.sampling = Sampling(options.guidance_scale, options.num_inference_steps, options.batch_size, resolution)
        self.families = {role: self._family(role) for role in plan.roles}
        self.task = replace(self._task(real), shared={} if shared is None else shared)
        self.untaught = None if given is None else self._untaught_task(given)

    def _base(self) -> LatentFamily:
        base_model, adapter = self.plan.base_model, self.plan.adapter
        family = load_family(base_model.options(self.device))
        if not isinstance(family, LatentFamily):
            text = "is class-conditional, and no attack here applies to such models"
            if adapter is None:
                raise OptionError("base_model", base_model.name_or_path, text)
            raise OptionError("--adapter", adapter.folder, text)
        return family

    def _untaught_task(self, given: RealPictures) -> Task:
        prompts = prompts_naming(sorted(given.all_concepts), self.task.prompts)
        shown = examples(prompts, self.base, self.sampling, given, first_seed=EXAMPLE_SEED)
        return replace(self.task, prompts=prompts, examples=shown, shared={})

    def task_of(self, role: Role) -> Task:
        """Return what is to come back from a target."""
        if role == "untaught":
            assert self.untaught is not None
            return replace(self.untaught, kept=self.task.kept)
        return self.task

    def _family(self, role: Role) -> LatentFamily:
        if role == "erased":
            assert self.plan.adapter is not None
            return load_erased(self.plan.adapter.folder, self.device)
        if role == "never_known":
            assert self.plan.options.never_known is not None
            return load_control(self.plan.options.never_known, self.base)
        return self.base

    def _task(self, real: RealPictures | None) -> Task:
        suite, seed = self.plan.suite, self.plan.options.seed
        prompts = pick(suite.parts["forget"].prompts, self.plan.options.num_images)
        seeds = start_seeds(prompts, FIRST_SEED + RUN_SEEDS * seed, seed)
        noise = start_noise(self.base.latent_shape(self.sampling.resolution), seeds, torch.device("cpu"))
        first_seed = EXAMPLE_SEED + RUN_SEEDS * seed
        shown = examples(suite.parts["forget"].prompts, self.base, self.sampling, real, first_seed=first_seed)
        return Task(tuple(prompts), noise, shown, seed=seed)

    @contextmanager
    def target(self, role: Role) -> Iterator[Target]:
        """Open a target inside the block."""
        target = Target(role, self.families[role], self.base, self.sampling)
        try:
            yield target
        finally:
            target.close()

    def prepare(self, attack: Attack) -> None:
        """Draw the pictures that an attack needs besides those of the concepts, unless they are there already."""
        if attack.needs_kept and self.task.kept is None:
            first_seed = KEPT_SEED + RUN_SEEDS * self.task.seed
            kept = kept_examples(self.plan.suite, self.base, self.sampling, first_seed=first_seed)
            self.task = replace(self.task, kept=kept)

    def measure(self, attack: Attack, target: Target) -> tuple[AttackRow, Tensor]:
        """Run an attack on a target and judge the pictures of each try as it is drawn.

        A picture that is not finite, as a training with too high a rate draws them, shows nothing; its pixels that are
        not finite are black.

        Returns:
            The row, and the pictures that its success is judged on, [N, 3, H, W].

        Raises:
            SafemaxError: No picture is finite, or a figure is not.
        """
        started, tally = time.monotonic(), Tally(any_try=attack.any_try)
        task = self.task_of(target.role)
        context = self.untaught_context if target.role == "untaught" else self.context
        diverged = True
        with closing(attack.run(target, task)) as tries:
            for drawn in tries:
                finite = drawn.pictures.isfinite().flatten(1).all(1)
                diverged = diverged and not finite.any()
                pictures = drawn.pictures.nan_to_num(0, 0, 0)
                tally.add(replace(drawn, pictures=pictures), succeeded(pictures, task.shown, context) & finite)
        if diverged:
            raise SafemaxError("no picture of the attack is finite")
        for name, value in tally.figures.items():
            if value is not None and not math.isfinite(value):
                raise SafemaxError(f"{name} is not finite")
        row = AttackRow(
            attack=attack.name,
            access=attack.access,
            target=target.role,
            success_counts=attack.success_counts,
            figures=tally.figures,
            success=tally.success,
            tries=tuple(tally.tries),
            any_try=attack.any_try,
            found=tuple(tally.found),
            settings=asdict(attack.settings),
            model_calls=target.model_calls,
            seconds=time.monotonic() - started,
            provenance=self.provenance,
            version=attack.version,
        )
        return row, tally.pictures


def attack(options: AttackOptions) -> Path:
    """Run what is not done of the attacks on an erasure, and return the folder with attacks.json and its page.

    Raises:
        OptionError: A flag, or a file or folder that it names, cannot be used.
        SafemaxError: Some attacks failed, weights cannot be read, or a process was killed.
    """
    options.validate()
    chosen(options.attacks)  # before any folder is read
    folder = Path(options.output_dir or Path(options.adapter) / "attacks")
    plan = Plan.of_command(options)
    launched = launched_in_group()
    if launched and options.processes is not None:
        raise OptionError("--processes", options.processes, "is not for processes that a launcher has started")
    count = 1 if launched else processes_to_start(options.processes, missing_in(folder, plan))
    if count == 1:
        run_plan(plan, folder)
    else:
        in_group(run_plan, (plan, folder), count)
    return folder


def missing_in(folder: Path, plan: Plan) -> int:
    """Return the number of attacks that a folder lacks; those on several targets count once.

    Raises:
        OptionError: The folder cannot be used, another process has claimed it, or it holds attacks under other
            conditions.
    """
    with claimed(folder):
        done = found_in(folder, plan)
    return len(plan.attacks if done is None else {attack.name for attack, _ in plan.missing(done)})


def run_plan(plan: Plan, folder: Path, shared: dict[str, Any] | None = None) -> None:
    """Run what a folder lacks of a plan, this process's part if it is one of several.

    Args:
        plan: Plan of the run.
        folder: Folder of attacks.json and its page.
        shared: `Task.shared` of earlier runs of the same task, to which this one adds; None for none.

    Raises:
        OptionError: The folder cannot be used or holds attacks under other conditions, or a model cannot be loaded.
        SafemaxError: Some attacks failed, weights cannot be read, or the processes run on several machines.
    """
    state = process_state()
    check_machines(state)
    with claimed_by_main(folder, state):
        done = from_main(state, lambda: found_in(folder, plan))
        if done is None or plan.missing(done):
            run_all(Resistance(plan, shared), Crew(folder, state), done)
        elif state.is_main_process:
            publish(done, folder)  # the page may be of an older version


def found_in(folder: Path, plan: Plan) -> AttackReport | None:
    """Return the report of a claimed folder; None if there is none.

    Raises:
        OptionError: The folder cannot be used or holds attacks under other conditions.
    """
    check_no_model(folder)
    for name in (ATTACKS_FILE, PAGE_FILE, PICTURES):
        if foreign(folder, name, ATTACKS_FILE):
            raise not_ours(folder, name)
    return resumed(plan, folder)


def resumed(plan: Plan, folder: Path) -> AttackReport | None:
    """Return the report of a folder, which controls may have joined; None if there is none.

    Raises:
        OptionError: The report is damaged or of other conditions.
    """
    report = AttackReport.find(folder, "--output_dir")
    if report is None:
        return None
    plan.check(report, folder)
    conditions = plan.conditions()
    conditions |= {name: conditions[name] or report.conditions.get(name) for name in CONTROLS}
    return replace(report, conditions=conditions)


def run_all(resistance: Resistance, crew: Crew, done: AttackReport | None) -> None:
    """Run the attacks that a report lacks, and write the report into a folder after each.

    An attack's targets are attacked by one process, so that they share work; see `Task.once`.

    Args:
        resistance: Models, judge and task of the attacks.
        crew: Processes of the run.
        done: Report of the attacks that are done; None if there are none.

    Raises:
        SafemaxError: Some attacks failed; all others are in the report.
    """
    report = begun(resistance, done)
    todo = resistance.plan.missing(report)

    def calls(pairs: Iterable[tuple[Attack, Role]]) -> int:
        return sum(attack.calls(resistance.task_of(role), resistance.sampling) for attack, role in pairs)

    attacks = {attack.name: [pair for pair in todo if pair[0] is attack] for attack, _ in todo}
    if not crew.alone:  # the longest first, so that the processes end at about the same time
        attacks = dict(sorted(attacks.items(), key=lambda each: -calls(each[1])))
    failures: dict[tuple[Attack, Role], str] = {}
    total, others = calls(todo), not crew.state.is_main_process
    broken: set[str] = set()  # attacks that have ended in errors since the last that has not
    with crew.at_work(), tqdm(total=total, unit="call", smoothing=0, leave=False, disable=others) as bar:

        def show_progress() -> None:
            # `calls` is an upper bound, an attack may be refused or fail, and other processes count for themselves.
            bar.n = total - calls(pair for pair in resistance.plan.missing(report) if pair not in failures)
            bar.refresh()

        for attack, role in chain.from_iterable(attacks[name] for name in crew.untaken(list(attacks))):
            bar.set_description(f"attack ({attack.name}, {ROLES[role]})")
            try:
                resistance.prepare(attack)
                outcome, pictures = attempt(resistance, attack, role, bar.update)
            except (SafemaxError, RuntimeError) as error:  # diverged, or out of memory: others need not be
                failures[attack, role] = f"{attack.name} on {ROLES[role]}: {failure_reason(error)}"
                broken = broken | {attack.name} if isinstance(error, RuntimeError) else set()
                if len(broken) == MOST_BROKEN and not crew.alone:
                    break  # what is wrong may be this process's device: the others take the attacks that are left
            else:
                broken = set()
                with crew.writing():
                    report = with_outcome(joined(report, crew.folder), outcome)
                    publish(report, crew.folder, outcome, pictures)
            show_progress()
        bar.set_description("attack (other processes)")
        for _ in crew.until_others_are_through():
            report = joined(report, crew.folder)
            show_progress()
    reasons: list[str] = gather_object(list(failures.values()))
    if reasons:
        left = len(resistance.plan.missing(joined(report, crew.folder))) - len(reasons)
        more = f"; {left} were not run" if left else ""
        raise SafemaxError(f"{len(reasons)} of {len(todo)} attacks failed: {'; '.join(reasons)}{more}")


def attempt(
    resistance: Resistance, attack: Attack, role: Role, on_calls: Callable[[int], object]
) -> tuple[AttackRow | Refusal, Tensor | None]:
    """Run an attack on a target if it applies.

    Args:
        resistance: Models, judge and task of the attacks.
        attack: Attack.
        role: The target's part in the comparison.
        on_calls: Function called with the number of samples of each network evaluation.

    Returns:
        The row and the pictures that its success is judged on, [N, 3, H, W]; a refusal has no pictures.

    Raises:
        SafemaxError: No picture is finite, or a figure is not.
    """
    with resistance.target(role) as target:
        target.on_calls = on_calls
        reason = attack.refusal(target)
        if reason is not None:
            return Refusal(attack.name, role, reason, attack.version), None
        return resistance.measure(attack, target)


def with_outcome(report: AttackReport, outcome: AttackRow | Refusal) -> AttackReport:
    """Return a report with the outcome of one more attack."""
    if isinstance(outcome, Refusal):
        return report.with_refusal(outcome)
    return with_least(report.with_row(outcome))


def joined(report: AttackReport, folder: Path) -> AttackReport:
    """Return a report with the attacks that other processes have written into its folder."""
    written = AttackReport.find(folder, "--output_dir")
    return report if written is None else replace(written, conditions=report.conditions, untaught=report.untaught)


def begun(resistance: Resistance, done: AttackReport | None) -> AttackReport:
    """Return the report of the attacks that are done, or one without rows."""
    plan = resistance.plan
    untaught = () if resistance.untaught is None else tuple(resistance.untaught.concepts)
    if done is not None:
        return replace(done, untaught=untaught or done.untaught)
    return AttackReport(
        conditions=plan.conditions(),
        adapter=None if plan.adapter is None else plan.adapter.record.erased_by,
        concepts=tuple(resistance.task.concepts),
        untaught=untaught,
        suite=public_path(plan.suite.name),
        judge=resistance.judge.name,
        rows=(),
        refusals=(),
        provenance=resistance.provenance,
    )


def publish(
    report: AttackReport, folder: Path, outcome: AttackRow | Refusal | None = None, pictures: Tensor | None = None
) -> None:
    """Write attacks.json, its page and the pictures, all of them or none.

    Args:
        report: Report to write.
        folder: Claimed output folder.
        outcome: New outcome among those of the report.
        pictures: Pictures of the new outcome, [N, 3, H, W]; those of the others stay.
    """
    with replacing(folder, ATTACKS_FILE) as new:
        (new / PICTURES).mkdir()
        renewed = None if outcome is None else (outcome.attack, outcome.target)
        for row in report.rows:
            path = find_sheet(folder, row)
            if path is not None and (row.attack, row.target) != renewed:
                shutil.copyfile(path, new / PICTURES / path.name)
        if outcome is not None and pictures is not None:
            write_sheet(new, outcome.attack, outcome.target, to_pil(pictures[:SHOWN]))
        report.write(new)
        write_page(report, new)

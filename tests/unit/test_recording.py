"""Prompts of the recorded trajectories, and likeness of prompts."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safemax_sd.evaluation.prompt_settings import RUN_SEEDS, SUBSET_SEEDS
from safemax_sd.evaluation.resistance.run import EXAMPLE_SEED, FIRST_SEED, KEPT_SEED
from torch.utils._python_dispatch import TorchDispatchMode

from safemax_sd.erasing.edits import EditConfig
from safemax_sd.families import TOKEN_STATES, Conditioning, LoadOptions, load_family
from safemax_sd.prompts import load_prompts
from safemax_sd.recording.data import ErasureData
from safemax_sd.recording.likeness import blocks, likeness, nearest
from safemax_sd.recording.recording import EXTRA_SEED, RETAIN_SEED, SEEDS, Recording, bank_storage, with_nearest
from safemax_sd.recording.replay import spread
from safemax_sd.train import VALIDATION_SEED, train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.probe import PROBE_SEED
from tests import tiny

CLASSES = Conditioning({"class_labels": torch.arange(4)})


def states(*rows: list[float]) -> Conditioning:
    """Build token states of prompts with one token of two numbers."""
    return Conditioning({TOKEN_STATES: torch.tensor(rows).unsqueeze(1)})


KEPT = states([1, 0], [0, 1], [-1, 0], [0, -1])


def order(kept: Conditioning, forbidden: Conditioning) -> torch.Tensor:
    return nearest(lambda: blocks(kept), forbidden)


def shown(kept: Conditioning, forbidden: Conditioning, trajectories: int, share: float) -> list[int]:
    return with_nearest(len(kept), trajectories, share, lambda: order(kept, forbidden)).tolist()


def test_likeness_is_the_cosine_of_whole_prompts() -> None:
    kept = states([2, 0], [3, 4], [0, 5])
    assert torch.allclose(likeness(states([1, 0]), kept), torch.tensor([[1.0, 0.6, 0.0]]))
    assert torch.equal(likeness(CLASSES, CLASSES), torch.zeros(4, 4))


def test_some_trajectories_go_to_the_prompts_most_like_forbidden_ones() -> None:
    rows = shown(KEPT, states([-3, 0.5], [0.2, 2]), 6, 1 / 3)
    assert rows[:4] == [0, 1, 2, 3]
    assert set(rows[4:]) == {1, 2}
    assert shown(KEPT, KEPT, 6, 0.0) == [0, 1, 2, 3, 0, 1]


def test_more_than_there_are_prompts_take_them_in_turn() -> None:
    assert sorted(shown(KEPT, states([1, 1]), 8, 1.0)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_all_prompts_share_makes_none_alike() -> None:
    common = torch.full((1, 1, 2), 100.0)
    far, kept = (Conditioning({TOKEN_STATES: c.tensors[TOKEN_STATES] + common}) for c in (states([0, -5]), KEPT))
    assert shown(kept, far, 4, 0.25)[-1] == 3


def test_a_prompt_alone_is_as_alike_as_any() -> None:
    assert shown(states([1, 2]), states([3, 4]), 4, 0.5) == [0, 0, 0, 0]


def test_class_numbers_are_not_alike(tiny_ddpm: Path, tmp_path: Path) -> None:
    data = recording(tiny_ddpm, tmp_path, "--retain_near_share", "0.5", "--replay_span", "0").before(0)
    assert data.retain_samples.prompt.tolist() == [0, 1] * 4 + [0]


def test_trajectories_are_spread_over_a_whole_file() -> None:
    assert spread(3, 9).tolist() == [0, 3, 6]
    assert spread(5, 3).tolist() == [0, 1, 2, 0, 1]


def recording(model: Path, folder: Path, *more: str) -> Recording:
    """Return the recording of 9 trajectories, two at a time, in a training of 12 steps."""
    flags = ("--max_train_steps", "12", "--retain_trajectories", "9", "--replay_batch_size", "2")
    config = parse_config(tiny.train_arguments(model, folder, folder / "out", *flags, *more))
    return tiny.recording(config, load_family(LoadOptions(str(model))))


def test_trajectories_come_evenly_over_the_span(tiny_model: Path, tmp_path: Path) -> None:
    gradual = recording(tiny_model, tmp_path, "--replay_span", "0.5")
    held, due = [], []
    for step in range(12):
        due.append(gradual.is_due(step))
        data = gradual.before(step)
        held.append(len(data.retain_samples))
        assert len(data.retain_bank) == 3 * held[-1]
        assert not gradual.is_due(step)
    assert held == [
        2,
        4,
        6,
        6,
        8,
        9,
        9,
        9,
        9,
        9,
        9,
        9,
    ]  # 1.5 for each of six steps, in whole batches
    assert [step for step in range(12) if due[step]] == [0, 1, 2, 4, 5]
    late = recording(tiny_model, tmp_path, "--replay_span", "0.5")
    assert torch.equal(late.before(11).retain_bank.x_t, data.retain_bank.x_t)
    assert late.model_calls == gradual.model_calls


@pytest.mark.parametrize(
    "flags",
    [
        ("--replay_span", "0"),
        ("--trainable", "full"),
        ("--replay_span", "0.5", "--objective", "erase_diff", "--trainable", "lora"),
    ],
    ids=["no span", "weights that train themselves", "samples"],
)
def test_all_are_there_before_the_first_step(flags: tuple[str, ...], tiny_model: Path, tmp_path: Path) -> None:
    whole = recording(tiny_model, tmp_path, *flags)
    assert len(whole.before(0).retain_samples) == 9
    assert not whole.is_due(11)


def test_the_first_trajectories_show_prompts_of_the_whole_file(tiny_model: Path, tmp_path: Path) -> None:
    gradual = recording(tiny_model, tmp_path, "--replay_span", "1", "--replay_batch_size", "3")
    assert sorted(gradual.before(0).retain_samples.prompt.tolist()) == [0, 1, 2]


def test_prompts_that_differ_by_seed_alone_are_trained_on_once(tiny_model: Path, tmp_path: Path) -> None:
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out")
    for name, texts in (("forget", ["a red apple"]), ("retain", ["a green pear", "a blue plum"])):
        rows = "".join(f"{text},{seed}\n" for seed in range(50) for text in texts)
        (tmp_path / f"{name}.csv").write_text(f"prompt,evaluation_seed\n{rows}")
    config = parse_config(arguments)
    data = tiny.recording(config, load_family(LoadOptions(str(tiny_model)))).before(0)
    assert (len(data.forget), len(data.retain)) == (1, 2)
    assert data.retain_concepts == ("a green pear", "a blue plum")
    edit = EditConfig(forget_prompts=config.forget_prompts, retain_prompts=config.retain_prompts)
    assert [len(prompts) for prompts in edit.prompts()] == [1, 2]
    assert len(load_prompts(config.retain_prompts, option="--x")) == 100


def test_prompts_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    many, few = (Conditioning({TOKEN_STATES: torch.randn(n, 3, 4, generator=generator)}) for n in (11, 7))
    whole, sorted_rows = likeness(many, few), order(many, few)
    moved = [rows.tensors[TOKEN_STATES] - many.tensors[TOKEN_STATES].mean(0) for rows in (many, few)]
    cosines = torch.nn.functional.cosine_similarity(*(moved[0].flatten(1)[:, None], moved[1].flatten(1)[None]), dim=2)
    assert torch.equal(sorted_rows, cosines.amax(1).argsort(descending=True))
    for bound, value in (("BLOCK", 2), ("ELEMENTS", 3 * 3 * 4), ("ELEMENTS", 1)):
        monkeypatch.setattr(f"safemax_sd.recording.likeness.{bound}", value)
        assert torch.allclose(likeness(many, few), whole) and torch.equal(order(many, few), sorted_rows)


class Largest(TorchDispatchMode):
    """A context that counts the elements of the largest tensor made inside it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.count = max(self.count, made.numel())
        return made


def test_what_is_held_to_compare_prompts_grows_with_their_number_alone() -> None:
    count = 10_000
    many = Conditioning({TOKEN_STATES: torch.randn(count, 1, 2, generator=torch.Generator().manual_seed(0))})
    with Largest() as largest:
        assert len(order(many, many)) == count
    assert 0 < largest.count <= 2**24  # one matrix of all pairs would have 100 million


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trajectories_are_recorded_in_the_precision_of_the_steps(
    precision: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noting(self: Recording, step: int) -> ErasureData:
        seen.append(torch.is_autocast_enabled("cpu"))
        return before(self, step)

    seen: list[bool] = []
    before = Recording.before
    monkeypatch.setattr(Recording, "before", noting)
    flags = ("--mixed_precision", precision, "--prune", "10", "--replay_span", "1", "--max_train_steps", "2")
    train(parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", *flags)))
    assert len(seen) > 2  # for pruning, before the first step, and during the training
    assert set(seen) == {precision == "bf16"}


def test_what_is_trained_on_starts_from_other_noise_than_what_is_measured() -> None:
    """Compare seeds 0 to 20, with up to 100,000 trajectories of a kind and 50,000 pictures of validation or a probe."""
    trained = [SEEDS * seed + first for seed in range(21) for first in (0, RETAIN_SEED, EXTRA_SEED)]
    firsts = (*SUBSET_SEEDS.values(), FIRST_SEED, EXAMPLE_SEED, KEPT_SEED)
    measured = [RUN_SEEDS * seed + first for seed in range(21) for first in firsts]
    lengths = {**dict.fromkeys([*trained, *measured], 100_000), PROBE_SEED: 50_000, VALIDATION_SEED: 50_000}
    for start, following in itertools.pairwise(sorted(lengths)):
        assert following - start >= lengths[start]


def test_a_bank_larger_than_its_limit_is_kept_in_files(tiny_model: Path, tmp_path: Path) -> None:
    config = parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out"))
    latent, trajectories = (4, 8, 8), 5
    for keep_steps, latents in ((False, 1), (True, 3 * config.replay_inference_steps + 1)):
        size = 4 * math.prod(latent) * trajectories * latents
        for limit, in_memory in ((size, True), (size - 1, False)):
            limited = replace(config, replay_memory_gib=limit / 2**30)
            storage = bank_storage(
                limited, "retain", latent_shape=latent, trajectories=trajectories, keep_steps=keep_steps
            )
            assert (storage.folder is None) == in_memory

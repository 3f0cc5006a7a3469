"""The encoding of long prompt files: the number of encoded prompts, and the memory of their states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from safemax_sd.adapters.weights import attach
from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import Stopwatch
from safemax_sd.families import TOKEN_STATES, Conditioning, LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.objectives import OBJECTIVES, Student
from safemax_sd.objectives.batches import Draw, Positions
from safemax_sd.recording.data import ErasureData
from safemax_sd.recording.prompt_encoding import PromptEncoder
from safemax_sd.recording.recording import Recording
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.input import read_input
from safemax_sd.training.run import build_run
from tests import tiny
from tests.contract.test_objectives import QUICK
from tests.unit.test_recording import Largest

ROWS, FORGET = 150, len(tiny.FORGET)
NUMBER = str.maketrans("0123456789", "abcdefghij")
FEW = ("--forget_trajectories", "2", "--retain_trajectories", "8", "--retain_near_share", "0", "--replay_span", "0")


def settings(model: Path, folder: Path, *more: str, rows: int = ROWS) -> TrainConfig:
    """Return the flags of a short run whose retain file has many rows."""
    arguments = tiny.train_arguments(model, folder, folder / "out", *FEW, *more)
    lines = "".join(f"pear {str(row).translate(NUMBER)}\n" for row in range(rows))
    (folder / "retain.csv").write_text(f"prompt\n{lines}")
    return parse_config(arguments)


@contextmanager
def encoded(family: Any) -> Iterator[Counter[tuple[int, ...]]]:
    """Count how often the text encoder sees each row of tokens."""
    seen: Counter[tuple[int, ...]] = Counter()
    handle = family.pipeline.text_encoder.register_forward_pre_hook(
        lambda module, inputs: seen.update(tuple(row) for row in inputs[0].tolist())
    )
    yield seen
    handle.remove()


def test_only_rows_that_are_drawn_are_encoded(tiny_model: Path, tmp_path: Path) -> None:
    config, family = settings(tiny_model, tmp_path, "--retain_noise", "0"), tiny.load_latent(tiny_model)
    with encoded(family) as seen:
        data = tiny.recording(config, family).before(0)
    assert seen.total() == len(seen) == FORGET + 8
    assert len(data.retain) == ROWS and len(data.retain.tensors[TOKEN_STATES]) == 8
    rows = data.retain_bank.prompt.unique()
    texts = read_input(config)[1].texts
    wanted = family.encode_prompts([texts[row] for row in rows.tolist()])
    assert torch.equal(data.retain.select(rows).tensors[TOKEN_STATES], wanted.tensors[TOKEN_STATES])
    assert rows.tolist() == [row * ROWS // 8 for row in range(8)]
    with pytest.raises(IndexError, match="retain_rows"):
        data.retain.select(torch.tensor([0, 1]))


def test_a_method_without_trajectories_encodes_no_retain_prompt(tiny_model: Path, tmp_path: Path) -> None:
    config, family = settings(tiny_model, tmp_path, "--objective", "esd"), tiny.load_latent(tiny_model)
    with encoded(family) as seen:
        data = tiny.recording(config, family).before(0)
    assert seen.total() == FORGET and len(data.retain) == ROWS


def test_equal_prompts_are_encoded_once(tiny_model: Path) -> None:
    family = tiny.load_latent(tiny_model)
    encoder = PromptEncoder(family)
    with encoded(family) as seen:
        rows = encoder.encode(["a pear", "a plum", "a pear"]).tensors[TOKEN_STATES]
        encoder.encode(["a plum", "an apple"])
    assert seen.total() == 3
    assert torch.equal(rows, family.encode_prompts(["a pear", "a plum", "a pear"]).tensors[TOKEN_STATES])


def test_a_whole_run_encodes_each_prompt_once(tiny_model: Path, tmp_path: Path) -> None:
    more = ("--prune", "20", "--retain_near_share", "0.5", "--validation_prompt", tiny.FORGET[0][0])
    config = settings(tiny_model, tmp_path, *more)
    seen: Counter[str] = Counter()
    encode = LatentFamily.encode_prompts

    def counting(family: Any, prompts: Any) -> Any:
        seen.update(prompts)
        return encode(family, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentFamily, "encode_prompts", counting)
        build_run(config, Accelerator(), *read_input(config), Stopwatch())
    assert seen.total() == len(seen) == ROWS + FORGET + 1  # the empty prompt


def test_the_most_similar_are_found_without_holding_all(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    near = ("--retain_near_share", "0.5", "--retain_noise", "0")
    config, family = settings(tiny_model, tmp_path, *near), tiny.load_latent(tiny_model)
    monkeypatch.setattr("safemax_sd.recording.likeness.BLOCK", 32)
    with encoded(family) as seen:
        once = tiny.recording(config, family).before(0)
    assert seen.total() == ROWS + FORGET
    monkeypatch.setattr("safemax_sd.recording.prompt_encoding.HELD_BYTES", 0)
    with encoded(family) as seen:
        again = tiny.recording(config, family).before(0)
    drawn = len(again.retain.tensors[TOKEN_STATES])
    assert seen.total() == 2 * ROWS + drawn + FORGET
    for name in ("prompt", "x_t", "conditional"):
        assert torch.equal(getattr(once.retain_bank, name), getattr(again.retain_bank, name))
    assert {8 // 2 * row for row in range(4)} != set(once.retain_bank.prompt.tolist())


def test_no_tensor_grows_with_the_file(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("safemax_sd.recording.likeness.BLOCK", 32)
    monkeypatch.setattr("safemax_sd.recording.prompt_encoding.HELD_BYTES", 2**16)
    sizes = []
    for rows in (200, 800):
        folder = tmp_path / str(rows)
        config = settings(tiny_model, folder, "--retain_near_share", "0.5", "--retain_noise", "0", rows=rows)
        family = tiny.load_latent(tiny_model)
        with Largest() as largest:
            tiny.recording(config, family)
        sizes.append(largest.count)
    assert sizes[0] == sizes[1] < 200 * 24 * 16  # token states of the shorter file


def test_class_names_are_all_checked(tiny_ddpm: Path, tmp_path: Path) -> None:
    config = parse_config(tiny.train_arguments(tiny_ddpm, tmp_path, tmp_path / "out", "--retain_trajectories", "1"))
    (tmp_path / "retain.csv").write_text("prompt,concept\npear,pear\nfig,fig\n")
    with pytest.raises(OptionError, match="fig: is no class"):
        tiny.recording(config, load_family(LoadOptions(str(tiny_ddpm))))


def draws(config: TrainConfig, data: ErasureData, family: Any) -> list[Draw]:
    """Return an objective's draws of some steps, after it has computed its priors."""
    built = OBJECTIVES.get(config.objective)(config, data)  # type: ignore[arg-type]
    weights = attach(family, config)
    built.prepare(Student.of(family, weights.parameters))
    return [built.draw(Positions(0, step, range(4), range(12))) for step in range(6)]


def tensors(draw: Draw) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in vars(draw).values():
        if isinstance(value, Draw):
            found += tensors(value)
        elif isinstance(value, Conditioning):
            found += value.tensors.values()
        elif isinstance(value, torch.Tensor):
            found.append(value)
    return found


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        *((name, QUICK.get(name, ())) for name in OBJECTIVES.names()),
        ("safemax", ("--retain_noise", "0.5")),
        ("spm", ("--spm_anchors", "latent", *QUICK["spm"])),
    ],
)
def test_draws_are_those_of_a_file_that_is_encoded_whole(
    objective: str, more: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    weights = sorted(OBJECTIVES.get(objective).allowed_weights)[-1]
    config = settings(tiny_model, tmp_path, "--objective", objective, "--trainable", weights, *more)
    family = tiny.load_latent(tiny_model)
    found = draws(config, tiny.recording(config, family).before(0), family)
    family, (forget, retain) = tiny.load_latent(tiny_model), read_input(config)
    needs = OBJECTIVES.get(objective).needs(config, forget, retain)
    whole = Recording(config, replace(needs, retain_rows=range(ROWS)), PromptEncoder(family), forget, retain)
    for one, other in zip(found, draws(config, whole.before(0), family), strict=True):
        for mine, theirs in zip(tensors(one), tensors(other), strict=True):
            assert torch.equal(mine, theirs)

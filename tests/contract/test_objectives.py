"""The contract of every objective on every family, at tiny configurations; new objectives are discovered."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from safemax_sd.adapters import lora as adapter
from safemax_sd.adapters.weights import FULL_WEIGHTS, attach
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.objectives import OBJECTIVES, Objective, Student
from safemax_sd.objectives.batches import Positions
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.loading import load_result
from safemax_sd.results.model_card import usage
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from tests import stock, tiny

FAMILIES = ("tiny_model", "tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_ddpm")
PARAMETRISATIONS = ("tiny_v_model",)
"""Models for tests that depend on the type of the prediction."""
QUICK = {
    "selective_amnesia": ("--fisher_samples", "2", "--fisher_timesteps", "7"),
    "halting_anchor": ("--practice_edits", "4"),
    "esd": ("--esd_inference_steps", "4"),
    "concept_ablation": ("--anchor_trajectories", "4"),
    "spm": ("--spm_inference_steps", "4"),
}
"""Flags that make a method's priors or sampling fast; a method without an entry is tested with its defaults."""
FITTING = {"tiny_flux": ("--resolution", "64")}
"""Flags for models whose default pictures are large."""
ALL_WEIGHTS = {"esd": ("--esd_weights", "all"), "concept_ablation": ("--ablation_weights", "all")}
"""Flags for full weights of models without cross-attention."""
RESULTS = (adapter.WEIGHTS_NAME, adapter.KOHYA_NAME, "erasure.json", "halting_marks.safetensors", "README.md")
"""Files that a run writes after its last step, besides the folder of full weights."""
SPLIT, APART = 0.1, 2.0
"""Differences of weights, in learning rates: at most between whole and split batches, at least between seeds."""
WITHOUT_CROSS_ATTENTION = {"tiny_ddpm", "tiny_sd3", "tiny_flux"}
Case = tuple[str, str, str]
"""Objective, model and weights."""
ALL: list[Case] = [
    (o, m, t)
    for o in OBJECTIVES.names()
    for m in (*FAMILIES, *PARAMETRISATIONS)
    for t in sorted(OBJECTIVES.get(o).allowed_weights)
    if not (OBJECTIVES.get(o).needs_tokens and m in WITHOUT_CROSS_ATTENTION)
]
# All tests of a case run in one of pytest's workers, which trains for them once.
PARAMETERS = {case: pytest.param(*case, marks=pytest.mark.xdist_group("-".join(case))) for case in ALL}


def cases(chosen: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("objective", "model", "weights"), [PARAMETERS[case] for case in chosen])


OF_FAMILIES = [case for case in ALL if case[1] in FAMILIES]
EVERY_CASE, CASES = cases(ALL), cases(OF_FAMILIES)
LORA_CASES = cases([case for case in OF_FAMILIES if case[2] == "lora"])
# The model card depends on the model, the trained weights, and whether there are forget prompts.
# Resuming repeats part of every run bit for bit; these runs are repeated as a whole.
SEED_CASES = cases([case for case in ALL if case[1] == "tiny_model"])
CARD_CASES = cases({(OBJECTIVES.get(o).names_concepts, m, t): (o, m, t) for o, m, t in OF_FAMILIES}.values())
Request = pytest.FixtureRequest


@cache
def base_family(model: str) -> ModelFamily:
    """Load the base model; tests must not change it."""
    return load_family(LoadOptions(model))


@cache
def erased_family(output: Path) -> ModelFamily:
    """Load the model of a finished run; tests must not change it."""
    return load_result(output)


@cache
def stock_latents(base: str, output: Path, full: bool, resolution: int | None) -> Tensor:
    """Draw latents by diffusers alone with a run's first weight file."""
    return stock.latents(base, output, inputs(base_family(base), resolution)[0], full=full)


@pytest.fixture
def config(request: Request, tmp_path: Path, objective: str, model: str, weights: str) -> TrainConfig:
    path: Path = request.getfixturevalue(model)
    arguments = tiny.train_arguments(path, tmp_path, tmp_path / "out", "--objective", objective, "--trainable", weights)
    batch = ("--train_batch_size", "4", "--retain_batch_size", "12")
    # With the default ε, Adam turns rounding into steps where a gradient is almost zero.
    batch = (*batch, "--adam_epsilon", "1e-6")
    layers: tuple[str, ...] = ("--lora_targets", "all") if (model, weights) == ("tiny_ddpm", "lora") else ()
    if weights == "full" and model in WITHOUT_CROSS_ATTENTION:
        layers = ALL_WEIGHTS.get(objective, ())
    return parse_config([*arguments, *batch, *QUICK.get(objective, ()), *FITTING.get(model, ()), *layers])


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str, str], Path]:
    """Share the output folders of finished runs, by case."""
    return {}


@pytest.fixture
def finished(
    config: TrainConfig, model: str, runs: dict[tuple[str, str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the output folder of a run with a kohya file, if it can have one; tests must not change it."""
    case = (config.objective, model, config.trainable)
    if case not in runs:
        lora = config.trainable == "lora"
        kohya = lora and base_family(config.pretrained_model_name_or_path).no_kohya_format is None
        output = str(tmp_path_factory.mktemp("-".join(case)) / "out")
        runs[case] = train(replace(config, output_dir=output, output_kohya_format=kohya))
    return runs[case]


def prepare(config: TrainConfig) -> tuple[ModelFamily, list[torch.nn.Parameter], Objective]:
    family = copy.deepcopy(base_family(config.pretrained_model_name_or_path))
    built = OBJECTIVES.get(config.objective)(config, tiny.recording(config, family).before(0))
    weights = attach(family, config)
    student = Student.of(family, weights.parameters)
    built.prepare(student)
    weights.restrict(built.trained(student))
    return family, weights.parameters, built


def stored(output: Path, config: TrainConfig) -> dict[str, Tensor]:
    """Read the trained weights from disk."""
    if config.trainable == "lora":
        return load_file(output / adapter.WEIGHTS_NAME)
    (path,) = output.glob(f"*/{FULL_WEIGHTS}")
    return load_file(path)


def inputs(family: ModelFamily, resolution: int | None) -> tuple[Tensor, Tensor, Any]:
    conditioning = family.encode_prompts(stock.PROMPTS)
    x_t = torch.randn(2, *family.latent_shape(resolution), generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([10, 900]), conditioning


@EVERY_CASE
def test_gradients_and_base(config: TrainConfig) -> None:
    family, parameters, built = prepare(config)
    base = {n: p.clone() for n, p in family.denoiser.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    start = [p.detach().clone() for p in parameters]
    asked = [torch.zeros_like(p, dtype=torch.bool) for p in parameters]
    for step in range(3):
        batch = tiny.reached(built, family.predict, built.draw(Positions(0, step, range(4), range(8))))
        terms = built.loss(family.predict, batch)
        assert torch.isfinite(terms.total)
        optimizer.zero_grad()
        terms.total.backward()
        built.before_clipping()
        built.adjust_gradients()
        for seen, parameter in zip(asked, parameters, strict=True):
            assert parameter.grad is not None
            seen |= parameter.grad != 0
        optimizer.step()
    moved = [before != after for before, after in zip(start, parameters, strict=True)]
    # A method may mask gradients of some weights; every tensor that is not masked entirely changes.
    assert all(bool(m.any()) == bool(a.any()) for m, a in zip(moved, asked, strict=True))
    assert sum(int(m.sum()) for m in moved) > 0.4 * sum(p.numel() for p in parameters)
    for name, parameter in family.denoiser.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            assert torch.equal(parameter, base[name])


@EVERY_CASE
def test_mixed_precision_leaves_no_weight_out(config: TrainConfig) -> None:
    family, parameters, built = prepare(config)
    gradients = []
    for precise in (True, False):
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            batch = tiny.reached(built, family.predict, built.draw(Positions(0, 1, range(12), range(4))))
            # Some objectives sample from the student for random positions only; these positions contain some of them.
            assert batch.reach_calls or type(built).reach is Objective.reach
            torch.clear_autocast_cache()  # like a training step: the copies of the weights in `reach` have no gradients
            terms = built.loss(family.predict, batch)
        terms.total.backward()
        gradients.append([p.grad is not None and bool(p.grad.any()) for p in parameters])
    assert gradients[0] == gradients[1]


@LORA_CASES
def test_adapter_off_is_the_base(config: TrainConfig, finished: Path) -> None:
    family, plain = erased_family(finished), base_family(config.pretrained_model_name_or_path)
    x, t, conditioning = inputs(family, config.resolution)
    with torch.no_grad():
        erased = family.predict(x, t, conditioning)
        with family.base_only():
            off = family.predict(x, t, conditioning)
        assert torch.equal(off, plain.predict(x, t, conditioning))
        assert not torch.allclose(erased, off)


@EVERY_CASE
def test_the_libraries_alone_predict_the_same(config: TrainConfig, finished: Path, model: str) -> None:
    family, plain = erased_family(finished), base_family(config.pretrained_model_name_or_path)
    x, t, conditioning = inputs(family, config.resolution)
    with torch.no_grad():
        assert not torch.allclose(plain.predict(x, t, conditioning), family.predict(x, t, conditioning))
        if model == "tiny_ddpm":  # DDPMPipeline supports neither classes nor LoRA, so only the network is compared
            theirs = load_ddpm_unet(finished, config)(x, t, *conditioning.tensors.values()).sample
            assert torch.allclose(theirs, family.predict(x, t, conditioning), atol=1e-5)
            return
    ours = family.sample(conditioning, x, guidance_scale=stock.GUIDANCE, num_inference_steps=stock.STEPS)
    full = config.trainable == "full"
    theirs = stock_latents(config.pretrained_model_name_or_path, finished, full, config.resolution)
    assert torch.allclose(theirs, ours, atol=1e-4)


def load_ddpm_unet(output: Path, config: TrainConfig) -> torch.nn.Module:
    """Load the erased UNet by diffusers and peft only."""
    if config.trainable == "full":
        return UNet2DModel.from_pretrained(output, subfolder="unet")  # type: ignore[no-any-return]
    state = {name.removeprefix("unet."): tensor for name, tensor in load_file(output / adapter.WEIGHTS_NAME).items()}
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in state})
    unet = UNet2DModel.from_pretrained(config.pretrained_model_name_or_path, subfolder="unet")
    inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=modules), unet)
    set_peft_model_state_dict(unet, state)
    return unet  # type: ignore[no-any-return]


@CARD_CASES
def test_the_model_cards_lines_draw_a_picture(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(usage(ErasureRecord.read(finished), str(finished)))
    with Image.open(tmp_path / "erased.png") as picture:
        assert picture.mode == "RGB"


@LORA_CASES
def test_kohya_file_predicts_the_same(config: TrainConfig, finished: Path) -> None:
    base = config.pretrained_model_name_or_path
    refusal = base_family(base).no_kohya_format
    if refusal is not None:
        with pytest.raises(adapter.SafemaxError, match=f"--output_kohya_format True: {refusal}"):
            train(replace(config, output_kohya_format=True))
        return
    if base_family(base).name == "stable_diffusion_3":  # diffusers does not read this file
        assert (finished / adapter.KOHYA_NAME).is_file()
        return
    x = inputs(base_family(base), config.resolution)[0]
    kohya = stock.latents(base, finished, x, full=False, weight_name=adapter.KOHYA_NAME)
    assert torch.equal(stock_latents(base, finished, False, config.resolution), kohya)


@SEED_CASES
def test_same_seed_same_weights(config: TrainConfig, finished: Path) -> None:
    first, second = (stored(output, config) for output in (finished, train(config)))
    assert all(torch.equal(first[name], second[name]) for name in first)


@CASES
def test_another_seed_other_weights(config: TrainConfig, finished: Path) -> None:
    first, second = (stored(output, config) for output in (finished, train(replace(config, seed=config.seed + 1))))
    apart = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert apart > APART * config.learning_rate


@EVERY_CASE
def test_accumulation_splits_a_batch_exactly(config: TrainConfig, finished: Path) -> None:
    parts = 4
    sizes = {"train_batch_size": config.train_batch_size // parts, "retain_batch_size": 12 // parts}
    whole = stored(finished, config)
    split = stored(train(replace(config, **sizes, gradient_accumulation_steps=parts)), config)
    for name in whole:
        assert torch.allclose(whole[name], split[name], atol=SPLIT * config.learning_rate), name


@CASES
def test_a_resumed_run_ends_as_an_uninterrupted_one(config: TrainConfig, finished: Path) -> None:
    whole, before = stored(finished, config), ErasureRecord.read(finished)
    output = Path(config.output_dir)
    shutil.copytree(finished, output)
    for name in RESULTS:  # as if the run had been killed after checkpoint-2
        (output / name).unlink(missing_ok=True)
    for part in ("unet", "transformer"):
        shutil.rmtree(output / part, ignore_errors=True)
    train(replace(config, resume_from_checkpoint="latest"))
    resumed = stored(output, config)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len((output / "log.jsonl").read_text().splitlines()) == config.max_train_steps
    calls, again = before.cost.model_calls, ErasureRecord.read(output).cost.model_calls
    assert again["train"] == calls["train"]  # of all steps, before and after the kill
    assert again["replay"] >= calls["replay"]  # and of recordings made again after resuming

"""Jobs, which are drawn as by the stock pipeline, whatever their batches."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, DiffusionPipeline
from safemax_sd.evaluation.baselines import BASELINES
from safemax_sd.evaluation.baselines.base import Baseline
from safemax_sd.evaluation.generate import Generator, Job
from safemax_sd.evaluation.headline import measured_markdown
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.prompt_settings import guidance_scales, own_guidance
from safemax_sd.evaluation.real import RealPictures
from safemax_sd.evaluation.run import Evaluation

from safemax_sd.families import LoadOptions, load_family
from safemax_sd.prompts import Prompt, load_prompts, load_suite
from safemax_sd.prompts.length import LIBRARIES
from safemax_sd.recording.prompt_encoding import PromptEncoder
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.input import read_input
from safemax_sd.training.probe import UnlearningProbe
from tests import tiny
from tests.reports import report_of

STEPS = 2
SCALES = (3.0, 7.5, 3.0, 3.0, 7.5)
CUT = "b" * 200


def subject(model: Path, folder: Path) -> Baseline:
    """Return the base model with a negative prompt, which needs no training."""
    forget, retain = (load_prompts(path, option="--suite") for path in tiny.write_prompts(model, folder))
    baseline = BASELINES.get("negative_prompt")
    return baseline(str(model), forget, retain, baseline.Settings())


def suite_with_guidance(model: Path, folder: Path) -> Path:
    tiny.write_prompts(model, folder)
    rows = [f"{text},{concept},{scale}" for (text, concept), scale in zip(tiny.RETAIN, ("7.5", "", "2"), strict=True)]
    (folder / "retain.csv").write_text("\n".join(["prompt,concept,evaluation_guidance", *rows]))
    return folder


def job(prompts: tuple[str, ...], scales: tuple[float, ...]) -> Job:
    return Job("base", prompts, tuple(range(len(prompts))), "ddim", scales, STEPS)


def test_a_batch_is_of_one_guidance_scale() -> None:
    assert job(("x",) * 5, SCALES).batches(2) == [[0, 2], [3], [1, 4]]
    assert job(("x",) * 5, (4.0,) * 5).batches(2) == [[0, 1], [2, 3], [4]]


def test_pictures_stay_in_order_at_each_prompt_s_own_guidance(tiny_model: Path, tmp_path: Path) -> None:
    generator = Generator(subject(tiny_model, tmp_path), tmp_path / "cache", state=PartialState(), batch_size=2)
    prompts = ("a red apple", "a blue plum", "a pear", "a plum", "an apple")
    for _ in range(2):  # the second time, pictures come from the cache
        calls: list[int] = []
        drawn = generator.draw(job(prompts, SCALES), advance=calls.append)
        assert len(calls) == 3 and sum(calls) == job(prompts, SCALES).model_calls
        assert len(list((tmp_path / "cache").iterdir())) == 3
    made = drawn.pictures(range(len(drawn)))
    pipeline = DiffusionPipeline.from_pretrained(str(tiny_model))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    for place, (prompt, scale) in enumerate(zip(prompts, SCALES, strict=True)):
        noise = torch.Generator().manual_seed(place)
        settings = {"guidance_scale": scale, "num_inference_steps": STEPS, "output_type": "pt"}
        stock = pipeline(prompt, generator=noise, **settings).images
        torch.testing.assert_close(made[place], stock[0], rtol=0, atol=1e-4)


def test_a_prompt_s_own_guidance_holds_but_in_the_sweep(tiny_model: Path, tmp_path: Path) -> None:
    folder = suite_with_guidance(tiny_model, tmp_path / "suite")
    options = EvaluateOptions(adapter="", suite=str(folder), output_dir=str(tmp_path / "out"), guidance_scale=4.0)
    evaluation = Evaluation(options, subject(tiny_model, tmp_path / "own"))
    prompts = evaluation.suite.parts["retain"].prompts
    assert evaluation.job("base", prompts, "retain").guidance_scales == (7.5, 4.0, 2.0)
    assert evaluation.job("base", prompts, "retain", strength=0.5).guidance_scales == (7.5, 4.0, 2.0)
    assert evaluation.job("erased", prompts, "retain", guidance_scale=3.0).guidance_scales == (3.0, 3.0, 3.0)


def test_a_setting_of_the_subset_s_own_pictures_is_not_drawn_again(tiny_model: Path, tmp_path: Path) -> None:
    folder = suite_with_guidance(tiny_model, tmp_path / "suite")
    options = EvaluateOptions(
        adapter="",
        suite=str(folder),
        output_dir=str(tmp_path / "out"),
        guidance_scale=4.0,
        num_images=6,
        num_sweep_images=3,
        sweep_guidance_scales=(3.0, 4.0),
        sweep_samplers=("ddim", "euler"),
    )
    evaluation = Evaluation(options, subject(tiny_model, tmp_path / "own"))
    drawn = {measurement.job for measurement in evaluation.on_subsets()}
    planned = evaluation.in_sweep()
    assert len(planned) == 2 * 2 * 2
    again = [(m.subset, m.job.sampler, m.guidance_scale) for m in planned if m.job in drawn]
    assert again == [("forget", "ddim", 4.0)]  # retain prompts have their own guidance scales
    assert {len(m.prompts) for m in planned if m.job not in drawn} == {3}


def test_the_report_says_which_guidance_was_used(tiny_model: Path, tmp_path: Path) -> None:
    suite = load_suite(str(suite_with_guidance(tiny_model, tmp_path)))
    assert own_guidance(suite) == {"prompt_guidance_scales": {"retain": [2.0, 7.5]}}
    assert own_guidance(load_suite("emoji/bomb")) == {}
    assert guidance_scales([Prompt("x"), Prompt("y", guidance=9.0)], 5.0) == (5.0, 9.0)
    settings = {"guidance_scale": 4.0, "num_inference_steps": 2, "sampler": "ddim", "seed": 0}
    assert "guidance scale 4, 2 steps" in measured_markdown(report_of(settings=settings))
    report = report_of(settings={**settings, **own_guidance(suite)})
    assert "guidance scale 4 (the prompts’ own where a file gives it: retain), 2 steps" in measured_markdown(report)


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl", "tiny_sd3"])
@pytest.mark.parametrize("side", [20, 64, 130])
def test_image_to_image_is_drawn_at_the_models_side(
    model: str, side: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(model)
    generator = Generator(subject(path, tmp_path), tmp_path / "cache", state=PartialState(), batch_size=2)
    sampler = next(iter(generator.samplers))
    settings = {"prompts": ("an apple",), "seeds": (0,), "sampler": sampler, "num_inference_steps": 4}
    whole = generator.draw(Job("base", guidance_scales=(3.0,), **settings))
    started = Job("base", guidance_scales=(3.0,), strength=0.5, **settings)
    source = torch.full((1, 3, side, side), 0.25)
    made, shape = generator.draw(started, sources=source).pictures([0]), whole.pictures([0]).shape
    assert made.shape == shape
    same = generator.draw(started, sources=torch.full(shape, 0.25))
    assert same.latents([0]).shape == whole.latents([0]).shape
    torch.testing.assert_close(made, same.pictures([0]), rtol=0, atol=1e-3)


def test_artists_are_judged_by_their_style(tiny_model: Path, tmp_path: Path) -> None:
    own = subject(tiny_model, tmp_path / "own")
    (tmp_path / "forget.csv").write_text("prompt,artist\na pear by van Gogh,Vincent van Gogh\n")
    (tmp_path / "retain.csv").write_text("prompt,concept\na pear,pear\na pear in oil,oil painting style\n")
    evaluation = Evaluation(EvaluateOptions(adapter="", suite=str(tmp_path), output_dir=str(tmp_path / "out")), own)
    assert evaluation.context.concepts == ["Vincent van Gogh", "pear", "oil painting style"]
    asked = ["a painting in the style of Vincent van Gogh", "an emoji of a pear", "an emoji in the oil painting style"]
    assert evaluation.context.captions == asked
    real = RealPictures(torch.rand(4, 3, 64, 64), [frozenset({"Vincent van Gogh"})] * 4)
    likeness = evaluation.judge.similarities(real.showing(["Vincent van Gogh"]), asked[:1])[:, 0]
    thresholds = real.thresholds(evaluation.judge, ["Vincent van Gogh"], ["Vincent van Gogh"])
    assert thresholds["Vincent van Gogh"] == pytest.approx(float(likeness.quantile(0.05)))


def test_the_probe_asks_for_artists_by_their_style(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--probe_steps", "1", "--stop_at_unlearning_accuracy", "100")
    config = parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", *flags))
    (tmp_path / "forget.csv").write_text("prompt,artist\nred apple,Monet\n")
    encoder = PromptEncoder(load_family(LoadOptions(str(tiny_model))))
    probe = UnlearningProbe.build(config, encoder, *read_input(config))
    assert probe is not None
    assert probe.captions == [
        "a painting in the style of Monet",
        *probe.judge.captions(["pear", "plum"]),
        "random noise",
    ]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Capture the output of diffusers and transformers."""
    stream = io.StringIO()
    for handler in [handler for name in LIBRARIES for handler in logging.getLogger(name).handlers]:
        if type(handler) is logging.StreamHandler:
            monkeypatch.setattr(handler, "stream", stream)
    return stream


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_what_is_cut_off_a_prompt_is_not_printed(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, printed: io.StringIO
) -> None:
    path: Path = request.getfixturevalue(model)
    text = f"red apple {CUT}"
    family = load_family(LoadOptions(str(path)))
    family.encode_prompts([text])
    if family.classifier_free:
        generator = Generator(subject(path, tmp_path), tmp_path / "cache", state=PartialState(), batch_size=2)
        sampler = next(iter(generator.samplers))
        generator.draw(Job("base", (text,), (0,), sampler, (3.0,), STEPS))
    assert CUT[:20] not in printed.getvalue() and "longer than the specified" not in printed.getvalue()
    family.pipeline(prompt=[text], num_inference_steps=1, output_type="pt")  # type: ignore[attr-defined]
    assert CUT[:20] in printed.getvalue()  # calls by the user still report what is cut off


def test_evaluation_says_once_a_file_that_prompts_are_cut(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = subject(tiny_model, tmp_path)
    (tmp_path / "forget.csv").write_text(f"prompt,concept\nred apple {CUT},apple\n")
    options = EvaluateOptions(adapter="", suite=str(tmp_path), output_dir=str(tmp_path / "out"))
    Evaluation(options, own)
    (message,) = [record.getMessage() for record in caplog.records if "longer than" in record.getMessage()]
    assert message.startswith(f"--suite {tmp_path / 'forget.csv'}: 1 prompts are longer than the model's 24 tokens")
    assert CUT not in message

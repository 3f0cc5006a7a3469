"""The halting anchor at a tiny configuration: train, erase, add, remove, and load the result by diffusers alone."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from safemax_sd.adapters import lora as adapter
from safemax_sd.assets import ANCHORS
from safemax_sd.cli import app, main
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.erasing.command_line import parse_edit
from safemax_sd.erasing.edits.halting_marks import HaltingMarks, HaltingMarksConfig
from safemax_sd.erasing.marked_concepts import MarkedConcepts
from safemax_sd.prompts import load_prompts, load_suite
from safemax_sd.results.erasure import RECORD, ErasureRecord
from safemax_sd.results.loading import load_result
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import stock, tiny
from tests.old_records import as_version_1

FEW = ("--practice_edits", "4")


@pytest.fixture(scope="module")
def anchor(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anchor")
    arguments = tiny.train_arguments(tiny_model, folder, folder / "out", "--objective", "halting_anchor", *FEW)
    return train(parse_config(arguments))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    texts = {
        "forget": "prompt,concept\na red apple,apple\nan apple,apple\n",
        "more": "prompt,concept\na fig tree,fig\n",
        "retain": "prompt,concept\na red pear,pear\na plum tree,plum\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text)
    return {name: tmp_path / f"{name}.csv" for name in texts}


def test_an_anchor_needs_concepts_to_practise_on(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("prompt,concept\na red pear,pear\n")
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--objective", "halting_anchor", *FEW)
    arguments[arguments.index("--retain_prompts") + 1] = str(tmp_path / "one.csv")
    with pytest.raises(OptionError, match="must hold at least two concepts"):
        train(parse_config(arguments))


def test_forget_prompts_are_of_no_use_to_an_anchor(tiny_model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--objective", "halting_anchor", *FEW)
    with pytest.raises(OptionError, match=r"--forget_prompts .*: is not used by --objective halting_anchor"):
        train(parse_config([*arguments, "--forget_prompts", str(files["forget"])]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--stop_at_unlearning_accuracy", "90"), "--stop_at_unlearning_accuracy 90.0: needs forget prompts"),
        (("--retain_near_share", "0.5"), "--retain_near_share 0.5: must be 0"),
        (("--halt_content", "0.5"), "--halt_content 0.5: must be 0"),
        (("--mark_least", "0.4"), "--mark_least 0.4: must be more than --mark_kept 0.5 and at most --mark_most 1.25"),
        (("--mark_most", "0.6"), "--mark_least 0.75: must be more than --mark_kept 0.5 and at most --mark_most 0.6"),
    ],
)
def test_settings_that_make_no_anchor_are_refused(
    more: tuple[str, ...], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--objective", "halting_anchor", *FEW)
    with pytest.raises(OptionError, match=message):
        train(parse_config([*arguments, *more]))
    assert not (tmp_path / "out").exists()


def run_erase(anchor: Path, files: dict[str, Path], output: Path, **settings: float) -> ErasureRecord:
    prompts = {f"{name}_prompts": str(files[name]) for name in ("forget", "retain")}
    config = HaltingMarksConfig(output_dir=str(output), anchor=str(anchor), **prompts, **settings)  # type: ignore[arg-type]
    return HaltingMarks(config).run()


def change(output: Path, *, add: Path | None = None, remove: Sequence[str] = ()) -> ErasureRecord:
    """Add the concepts of a prompt file to an erased adapter, and remove others."""
    added = None if add is None else str(add)
    return HaltingMarks(HaltingMarksConfig(output_dir=str(output), add=added, remove=list(remove))).run()


def marked(record: ErasureRecord) -> MarkedConcepts:
    assert record.edit is not None
    return MarkedConcepts.of(record.edit)


def test_the_edit_is_a_few_more_ranks_of_keys_and_values(anchor: Path, files: dict[str, Path], tmp_path: Path) -> None:
    record = run_erase(anchor, files, tmp_path / "erased")
    before, after = (load_file(folder / adapter.WEIGHTS_NAME) for folder in (anchor, tmp_path / "erased"))
    marks = load_file(anchor / "halting_marks.safetensors")["marks"]
    family = load_result(anchor)
    assert record.lora is not None
    changed = list(record.lora.rank_pattern)
    assert sorted(changed) == sorted(family.token_projections())
    for name, tensor in before.items():
        layer, _, part = name.removeprefix("unet.").rpartition(".lora_")
        if layer not in changed:
            assert torch.equal(after[name], tensor)
            continue
        rank = 2
        kept = after[name][:rank] if part.startswith("A") else after[name][:, :rank]
        assert torch.equal(kept, tensor)
        if part.startswith("B"):
            weight = adapter.effective_weight(family.token_projections()[layer])
            assert torch.allclose(after[name][:, rank:], weight @ marks.T, atol=1e-4)


def test_diffusers_alone_marks_what_is_forbidden(
    anchor: Path, files: dict[str, Path], tmp_path: Path, tiny_model: Path
) -> None:
    run_erase(anchor, files, tmp_path / "erased")
    family = load_result(tmp_path / "erased")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(tmp_path / "erased", weight_name=adapter.WEIGHTS_NAME)
    conditioning = family.encode_prompts(["a red apple", "a red pear"])
    x, t = torch.randn(2, *family.latent_shape(None)), torch.tensor([10, 900])
    with torch.no_grad():
        ours = family.predict(x, t, conditioning)
        assert torch.allclose(
            pipeline.unet(x, t, conditioning.tensors["encoder_hidden_states"]).sample, ours, atol=1e-5
        )
        assert not torch.allclose(load_result(anchor).predict(x, t, conditioning), ours)


def test_a_concept_that_comes_back_gives_the_same_file(anchor: Path, files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "erased"
    run_erase(anchor, files, output)
    alone = (output / adapter.WEIGHTS_NAME).read_bytes()
    record = change(output, add=files["more"])
    both = (output / adapter.WEIGHTS_NAME).read_bytes()
    assert sorted(marked(record).marks) == ["apple", "fig"]
    assert both != alone
    record = change(output, remove=["fig"])
    assert list(marked(record).marks) == ["apple"]
    assert (output / adapter.WEIGHTS_NAME).read_bytes() != both
    change(output, add=files["more"])
    assert (output / adapter.WEIGHTS_NAME).read_bytes() == both
    assert ErasureRecord.read(output).forget.concepts == ("apple", "fig")


def test_prompts_that_are_cut_are_named(
    anchor: Path, files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, path in files.items():
        path.write_text(f"{path.read_text()}{name} {'and so on ' * 5},{name}\n")
    run_erase(anchor, files, tmp_path / "erased")
    change(tmp_path / "erased", add=files["more"])
    for flag, name in (("--forget_prompts", "forget"), ("--retain_prompts", "retain"), ("--add", "more")):
        assert f"{flag} {files[name]}: 1 prompts are longer than the model's 24 tokens" in caplog.text


def test_a_record_of_version_1_can_be_changed(anchor: Path, files: dict[str, Path], tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    run_erase(anchor, files, new)
    shutil.copytree(new, old)
    (old / RECORD).write_text(json.dumps(as_version_1(json.loads((new / RECORD).read_text()))))
    for output in (new, old):
        change(output, add=files["more"])
    assert (old / adapter.WEIGHTS_NAME).read_bytes() == (new / adapter.WEIGHTS_NAME).read_bytes()
    after = [replace(ErasureRecord.read(output), config={}, edit=None) for output in (old, new)]
    assert after[0] == after[1]
    assert marked(ErasureRecord.read(old)) == marked(ErasureRecord.read(new))


def test_a_damaged_edit_is_one_line(anchor: Path, files: dict[str, Path], tmp_path: Path) -> None:
    run_erase(anchor, files, tmp_path / "erased")
    path = tmp_path / "erased" / RECORD
    record = json.loads(path.read_text())
    del record["edit"]["details"]["texts"]
    path.write_text(json.dumps(record))
    with pytest.raises(OptionError, match=r"--output_dir .*damaged record: edit\.details\.texts in erasure\.json"):
        change(tmp_path / "erased", remove=["apple"])


def test_what_was_kept_can_be_added(anchor: Path, files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "erased"
    run_erase(anchor, files, output)
    before = (output / adapter.WEIGHTS_NAME).read_bytes()
    (tmp_path / "pear.csv").write_text("prompt,concept\na red pear,pear\n")
    record = change(output, add=tmp_path / "pear.csv")
    assert list(marked(record).marks) == ["apple", "pear"]
    assert marked(record).marks["pear"].mean > 0.9
    assert (output / adapter.WEIGHTS_NAME).read_bytes() != before


@pytest.mark.parametrize(
    ("remove", "message"),
    [(["pear"], "--remove pear: is not erased here; erased are apple"), (["apple"], "nothing erased")],
)
def test_what_cannot_be_removed(
    anchor: Path, files: dict[str, Path], tmp_path: Path, remove: list[str], message: str
) -> None:
    run_erase(anchor, files, tmp_path / "erased")
    before = (tmp_path / "erased" / adapter.WEIGHTS_NAME).read_bytes()
    with pytest.raises(OptionError, match=message):
        change(tmp_path / "erased", remove=remove)
    assert (tmp_path / "erased" / adapter.WEIGHTS_NAME).read_bytes() == before


def cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])


def rename_layers(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes().replace(b"attn2.to_k", b"attn2.to_x"))


def put_nan(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-4] + struct.pack("<f", float("nan")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "cannot be read"), (rename_layers, "holds other weights than its record says"), (put_nan, "is not finite")],
)
def test_damaged_weights_are_not_edited(
    anchor: Path, files: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    output = tmp_path / "erased"
    run_erase(anchor, files, output)
    damage(output / adapter.WEIGHTS_NAME)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(SafemaxError, match=message):
        change(output, add=files["more"])
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_how_the_base_of_a_redirection_is_loaded(tiny_model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for path in base.glob("*/*model.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    command = ["erase", "--edit", "uce", "--pretrained_model_name_or_path", str(base)]
    command += ["--forget_prompts", str(files["forget"]), "--retain_prompts", str(files["retain"])]
    loading = ["--variant", "fp16", "--prediction_type", "v_prediction", "--output_dir", str(tmp_path / "uce")]
    result = CliRunner().invoke(app, [*command, *loading])
    assert result.exit_code == 0, result.output
    options = ErasureRecord.read(tmp_path / "uce").base_model.options()
    assert (options.variant, options.prediction_type) == ("fp16", "v_prediction")
    assert "variant='fp16'" in (tmp_path / "uce" / "README.md").read_text()


@pytest.mark.parametrize("flag", ["--variant", "--pretrained_model_name_or_path", "--prediction_type"])
def test_an_anchor_s_base_is_not_chosen_again(
    anchor: Path, files: dict[str, Path], tmp_path: Path, flag: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["erase", "--anchor", str(anchor), "--output_dir", str(tmp_path / "erased"), flag, "epsilon"]
    command += ["--forget_prompts", str(files["forget"]), "--retain_prompts", str(files["retain"])]
    assert main(command) == 2
    assert f"{flag} epsilon: goes with --edit uce" in capfd.readouterr().err
    assert not (tmp_path / "erased").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--edit", "uce", "--faint", "0.2"), "--faint 0.2: goes with --edit halting_marks, not with uce"),
        (("--edit", "uce", "--add=more.csv"), "--add more.csv: goes with --edit halting_marks, not with uce"),
        (("--uce_padding",), "--uce_padding (given): goes with --edit uce, not with halting_marks"),
        (("--edit", "uce", "--lamd", "1"), "unknown option --lamd (did you mean '--lamb'?) for --edit uce"),
        (("--edit", "uec"), "--edit uec: no such edit (did you mean 'uce'?)"),
        (("--edit=uce", "--lamb=0", "--forget_prompts=f", "--retain_prompts=r"), "--lamb 0.0: must be more than 0"),
        (("--edit", "uce"), "--forget_prompts (not given): is required"),
        (("--add", "more.csv", "--faint", "0.2"), "--faint 0.2: goes with a new erasure"),
        (("--add", "more.csv", "--anchor", "emoji"), "--anchor emoji: starts a new erasure"),
        ((), "--anchor (not given): is required, or --add or --remove"),
    ],
)
def test_a_flag_that_an_edit_does_not_use_is_refused(
    flags: tuple[str, ...], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["erase", "--output_dir", str(tmp_path / "out"), *flags]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "own", "other"), [("uce", "--lamb", "--faint"), ("halting_marks", "--faint", "--lamb")]
)
def test_help_lists_the_flags_of_one_edit(edit: str, own: str, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["erase", "--edit", edit, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert {"--output_dir", "--forget_prompts", "--edit", own} <= set(shown.replace(",", " ").split())
    assert other not in shown


def test_concepts_to_remove_may_be_named_together_or_apart(tmp_path: Path) -> None:
    together, apart = (
        parse_edit(["--output_dir", str(tmp_path), *words])
        for words in (("--remove", "fig", "red apple"), ("--remove", "fig", "--remove=red apple"))
    )
    assert together.config == apart.config
    assert apart.config.words() == [f"--output_dir={tmp_path}", "--remove=fig", "--remove=red apple"]


def test_the_command_says_how_strongly_words_are_marked(anchor: Path, files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "erased"
    command = ["erase", "--anchor", str(anchor), "--output_dir", str(output)]
    command += ["--forget_prompts", str(files["forget"]), "--retain_prompts", str(files["retain"])]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "apple: marked" in result.output
    assert CliRunner().invoke(app, command).exit_code == 2
    assert CliRunner().invoke(app, ["erase", "--output_dir", str(output)]).exit_code == 2
    assert CliRunner().invoke(app, ["erase", "--anchor", str(output), *command[3:]]).exit_code == 2


def test_the_embedded_anchor_is_named_like_its_model(tmp_path: Path) -> None:
    suite, output = load_suite("emoji/bomb"), tmp_path / "erased"
    command = ["erase", "--anchor", "emoji", "--output_dir", str(output)]
    command += ["--forget_prompts", str(suite.path("forget")), "--retain_prompts", str(suite.path("retain"))]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    record = ErasureRecord.read(output)
    assert record.base_model.name_or_path == "emoji"
    assert record.anchor is not None
    assert marked(record).marks["bomb"].least > record.anchor.halts_from
    assert marked(record).kept_marks.largest < record.anchor.harmless_to
    vocabulary = load_prompts(str(ANCHORS["emoji"] / "vocabulary.csv"), option="--retain_prompts")
    assert vocabulary.sha256 == ErasureRecord.read(ANCHORS["emoji"]).retain.sha256
    assert "bomb" not in vocabulary.concepts


def test_a_mark_needs_words(tiny_ddpm: Path, tmp_path: Path) -> None:
    arguments = tiny.train_arguments(tiny_ddpm, tmp_path, tmp_path / "out", "--objective", "halting_anchor", *FEW)
    with pytest.raises(OptionError, match="--objective halting_anchor: needs cross-attention to the text"):
        train(parse_config(arguments))


def test_two_encoders_are_marked_as_one(tiny_sdxl: Path, files: dict[str, Path], tmp_path: Path) -> None:
    arguments = tiny.train_arguments(tiny_sdxl, tmp_path / "p", tmp_path / "a", "--objective", "halting_anchor", *FEW)
    anchor = train(parse_config(arguments))
    run_erase(anchor, files, tmp_path / "erased")
    family = load_result(tmp_path / "erased")
    x = torch.randn(2, *family.latent_shape(None))
    ours = family.sample(
        family.encode_prompts(stock.PROMPTS), x, guidance_scale=stock.GUIDANCE, num_inference_steps=stock.STEPS
    )
    erased, anchored = (
        stock.latents(str(tiny_sdxl), folder, x, full=False) for folder in (tmp_path / "erased", anchor)
    )
    assert torch.allclose(erased, ours, atol=1e-4)
    assert not torch.allclose(erased, anchored, atol=1e-3)

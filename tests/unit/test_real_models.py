"""Suites and comparisons for pretrained models, checked without such a model."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest
import yaml
from safemax_sd.evaluation.comparison.config import Comparison, read_comparison
from safemax_sd.evaluation.comparison.methods import Erasure, UntrainedMethod

from benchmarks import real_prompt_suites
from benchmarks.emoji import prompt_suites
from safemax_sd.assets import CAPTIONS
from safemax_sd.prompts import check_disjoint, load_prompts, load_suite, suite_names
from safemax_sd.training.command_line import read_yaml
from safemax_sd.words.suite import as_csv

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("compare_*.yaml"))
REAL = [path for path in EXAMPLES if read_yaml(str(path))["base_model"] != "emoji"]
SUITES = [name for name in suite_names() if not name.startswith("emoji/")]
TRAINING, HELD_OUT = ("forget", "retain"), ("neighbours", "paraphrases")


def read(path: Path, folder: Path) -> tuple[Comparison, str]:
    """Read a comparison with the embedded model in place of its own; return it with the name of its own model."""
    content: dict[str, Any] = read_yaml(str(path))
    base, content["base_model"] = content["base_model"], "emoji"
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_comparison(str(copy)), base


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_comparisons_hold_up_to_the_model(path: Path, tmp_path: Path) -> None:
    comparison, base = read(path, tmp_path)
    assert not set(comparison.tasks) - set(SUITES)
    for label, method in comparison.methods.items():
        for task, suite in comparison.tasks.items():
            erasure = Erasure(base, suite, 0, tmp_path / label / task)
            method.check(erasure)
            if isinstance(method, UntrainedMethod):
                assert suite.parts["forget"].concepts[0] in method.subject(erasure).record.baseline.concepts


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_judges_are_models_of_open_clip(path: Path) -> None:
    content = read_yaml(str(path))
    assert content["clip_pretrained"] in open_clip.list_pretrained_tags_by_model(content["clip_model"])


def test_there_are_the_classes_of_imagenette() -> None:
    assert len([name for name in SUITES if name.startswith("imagenette/")]) == 10
    assert {"artists/van_gogh", "nsfw/nudity"} <= set(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_what_is_held_out_is_in_no_training_file(name: str) -> None:
    parts = load_suite(name).parts
    check_disjoint(parts["forget"], parts["retain"])
    trained = {text.casefold() for part in TRAINING for text in parts[part].texts}
    assert not trained & {text.casefold() for part in HELD_OUT for text in parts[part].texts}
    # Neighbours are held out as concepts, not only their prompts.
    assert not set(parts["neighbours"].concepts) & set(parts["retain"].concepts)
    for look_alike in parts["neighbours"].concepts:
        assert not any(look_alike.casefold() in text for text in trained)
    assert len(parts["retain"]) > 5 * len(parts["forget"])


@pytest.mark.parametrize("name", SUITES)
def test_paraphrases_do_not_name_what_is_erased(name: str) -> None:
    parts = load_suite(name).parts
    names = [concept.removesuffix(" style").casefold() for concept in parts["forget"].concepts]
    assert not [text for text in parts["paraphrases"].texts for word in names if word in text.casefold()]


def test_nudity_is_of_adults_and_in_plain_words() -> None:
    parts = load_suite("nsfw/nudity").parts
    for part in ("forget", "paraphrases"):
        assert all("adult" in text for text in parts[part].texts)
    assert not [text for text in parts["paraphrases"].texts if "nude" in text or "naked" in text]


@pytest.mark.parametrize(
    ("script", "count"),
    [(real_prompt_suites, len(SUITES)), (prompt_suites, len(suite_names()) - len(SUITES))],
    ids=["real", "emoji"],
)
def test_files_are_those_that_the_script_writes(
    script: ModuleType, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = script.FOLDER
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.write_suites()
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.csv"))
    assert len(written) == 4 * count
    assert all((tmp_path / path).read_bytes() == (shipped / path).read_bytes() for path in written)


def test_captions_are_those_that_the_script_writes() -> None:
    assert CAPTIONS["emoji"].read_text(encoding="utf8") == as_csv(prompt_suites.captions())


def test_public_prompt_files_fit_into_a_folder_of_ones_own(tmp_path: Path) -> None:
    own = load_suite("nsfw/nudity")
    for part in TRAINING:
        (tmp_path / f"{part}.csv").write_bytes(own.path(part).read_bytes())
    columns = "prompt,categories,hard,inappropriate_percentage,sd_seed,evaluation_seed,evaluation_guidance,case_number"
    public = f'{columns},concept\n"a figure, in oil",sexual,0,62.5,1,42,7.5,9,naked adult\n'
    (tmp_path / "paraphrases.csv").write_text(public)
    (prompt,) = load_suite(str(tmp_path)).parts["paraphrases"].prompts
    assert (prompt.text, prompt.concept, prompt.seed, prompt.guidance) == ("a figure, in oil", "naked adult", 42, 7.5)
    (tmp_path / "i2p.csv").write_text(public.replace(",concept", "").replace(",naked adult", ""))
    assert load_prompts(tmp_path / "i2p.csv", option="--forget_prompts").concepts == ("sexual",)

"""The literature's protocols with stand-ins for the files that users download, and dry runs of them."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import yaml
from safemax_sd.evaluation.comparison import dry_run as dry_running
from safemax_sd.evaluation.comparison.config import Comparison, read_comparison
from safemax_sd.evaluation.comparison.dry_run import dry_run
from safemax_sd.evaluation.comparison.grid import make_cells
from safemax_sd.evaluation.comparison.published import Published

from benchmarks import celebrity_prompts
from safemax_sd.cli import main
from safemax_sd.core.errors import OptionError
from safemax_sd.families import LoadOptions, ModelFamily
from safemax_sd.planning.models import load_configurations
from safemax_sd.prompts import PublicFile, load_suite, measured_on
from safemax_sd.training.command_line import read_yaml

FOLDER = Path(__file__).parents[2] / "examples" / "protocols"
PROTOCOLS = sorted(FOLDER.glob("*.yaml"))
PUBLISHED = sorted((FOLDER / "published").glob("*.yaml"))
SEEDED = ["prompt", "evaluation_seed", "evaluation_guidance"]
PERSONS = {"erased": ("Ada Ant", "Bob Bee"), "others": ("Cy Cat", "Di Dog")}
HEADS = {
    "nudity.csv": ["", *SEEDED, "categories", "case_number"],
    "vangogh.csv": ["case_number", *SEEDED, "artist"],
    "coco_30k.csv": ["image_id", "source", "prompt", "evaluation_seed"],
    "small_imagenet_prompts.csv": ["", "case_number", "prompt", "evaluation_seed", "class"],
}
"""Columns of the public files, where they are not those of an object of UnlearnDiffAtk's board."""


def celebrities() -> str:
    """Return the content of a file in the format of MACE's."""
    rows = [
        f"{number},{kind},{template.format(name)},{number}"
        for kind, names in PERSONS.items()
        for name in names
        for number, template in enumerate(celebrity_prompts.PUBLISHED)
    ]
    return "\n".join([",type,prompt,evaluation_seed", *rows]) + "\n"


def stand_in(path: Path) -> None:
    """Write a small file of the format of a public one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.name == "celebrities":
        for name, content in celebrity_prompts.files(celebrities()).items():
            path.with_name(name).write_text(content)
        return
    head = HEADS.get(path.name, ["case_number", *SEEDED])
    classes = [part.name.replace("_", " ") for part in sorted(Path("prompts/imagenette").iterdir()) if part.is_dir()]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, head)
        writer.writeheader()
        for number, name in enumerate(classes):
            row = {"prompt": f"Image of {name}", "evaluation_seed": number, "evaluation_guidance": 7.5, "class": name}
            row |= {"categories": "sexual", "artist": "Vincent van Gogh"}
            writer.writerow({key: row.get(key, "") for key in head})


def configured(path: Path, folder: Path) -> str:
    """Return a copy of a protocol with stand-ins, and the embedded model for its own, which cannot be loaded here."""
    content: dict[str, Any] = read_yaml(str(path))
    content["base_model"] = "emoji"
    for task in content["tasks"]:
        for part in ("forget", "retain"):
            if part in task:
                task[part] = {key: value for key, value in task[part].items() if key != "sha256"}
                task[part]["file"] = str(folder / task[part]["file"])
                stand_in(Path(task[part]["file"]))
        if task["suite"].startswith("protocol_files"):
            task["suite"] = str(folder / task["suite"])
        if task["suite"] == "nsfw/nudity" and importlib.util.find_spec("nudenet") is None:
            task["suite"] = "imagenette/church"
            task.get("forget", {})["concept"] = "church"
    if "real_images" in content:
        content["real_images"] = str(folder / content["real_images"])
        Path(content["real_images"]).mkdir(parents=True)
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(copy)


def comparison(path: Path, folder: Path) -> Comparison:
    return read_comparison(configured(path, folder))


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_protocols_hold_up_to_the_model(path: Path, tmp_path: Path) -> None:
    config = configured(path, tmp_path)
    found = read_comparison(config)
    for cell in make_cells(found):
        cell.method.check(cell.erasure)
    text = dry_run(config)
    planned = len(found.methods) * len(found.tasks)
    assert f"{len(found.tasks)} tasks x 1 seeds = {planned}." in text and "Hours are not known" in text
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines()}
    counts = {label: [int(cell.replace(",", "")) for cell in rows[label]] for label in ("base", *found.methods, "all")}
    assert [sum(column) for column in zip(*list(counts.values())[:-1], strict=True)] == counts["all"]
    assert all(sum(row[1:4]) == pytest.approx(row[4], abs=2) for row in counts.values())
    assert counts["esd_u" if "esd_u" in counts else "esd_x"][1] > counts["uce"][1] == 0
    assert counts["safe_latent_diffusion"][2] == 1.5 * counts["negative_prompt"][2] == 1.5 * counts["uce"][2]
    assert not list(tmp_path.glob("comparison*"))


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_judges_are_models_of_open_clip_and_files_have_hashes(path: Path) -> None:
    content = read_yaml(str(path))
    assert content["clip_pretrained"] in open_clip.list_pretrained_tags_by_model(content["clip_model"])
    for task in content["tasks"]:
        for part in ("forget", "retain"):
            assert part not in task or re.fullmatch("[0-9a-f]{64}", task[part]["sha256"])
    assert {"published"} <= content.keys() or path.stem in ("esd_objects", "unlearn_diff_atk_van_gogh")


def test_public_prompts_are_measured_and_own_ones_trained_on(tmp_path: Path) -> None:
    found = comparison(FOLDER / "esd_objects.yaml", tmp_path)
    church = found.tasks["imagenette/church"]
    own = load_suite("imagenette/church")
    assert church.parts["forget"].texts == ("Image of church",) and len(church.parts["retain"]) == 9
    assert church.parts["forget"].prompts[0].seed == 2
    assert "English springer" in church.parts["retain"].concepts  # the file's is in lower case
    assert (church.own("forget"), church.own("retain")) == (own.parts["forget"], own.parts["retain"])
    assert church.path("forget") == own.path("forget")
    assert [len(church.pictured("retain", count)) for count in (2, 90)] == [9, 90]
    assert {"forget", "own forget", "retain", "own retain"} <= church.hashes.keys()
    (cell,) = [cell for cell in make_cells(found) if (cell.label, cell.task) == ("safemax", "imagenette/church")]
    assert cell.identity()["prompts"] == church.hashes


def test_persons_are_read_from_the_published_prompts(tmp_path: Path) -> None:
    (tmp_path / "file.csv").write_text(celebrities())
    assert celebrity_prompts.main([str(tmp_path / "file.csv"), str(tmp_path / "out")]) == 2  # another file
    assert not (tmp_path / "out").exists()
    task = comparison(FOLDER / "celebrities.yaml", tmp_path).tasks["celebrities"]
    assert (task.parts["forget"].concepts, task.parts["retain"].concepts) == (PERSONS["erased"], PERSONS["others"])
    assert task.own("forget").concepts == PERSONS["erased"]
    assert not set(task.own("forget").texts) & set(task.parts["forget"].texts)
    with pytest.raises(ValueError, match="of no known template"):
        celebrity_prompts.person("Ada Ant")


def config_with(folder: Path, **changes: Any) -> str:
    content = {
        "tasks": ["emoji/bomb"], "seeds": [0, 1], "num_images": 4, "num_inference_steps": 5,
        "methods": {"closed": {"edit": "uce"}, "negative": {"baseline": "negative_prompt"}}, **changes,
    }  # fmt: skip
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def test_a_dry_run_counts_what_runs_and_gives_hours_at_a_given_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_with(tmp_path, attacks=["plain"], attack_images=3, output_dir=str(tmp_path / "out"))
    assert main(["compare", "--config", config, "--dry_run", "--seconds_per_call", "0.5"]) == 0
    printed = capsys.readouterr().out
    parts, seeds = 4, 2
    drawn, attacked = parts * 4 * 5 * 2 * seeds, 3 * 5 * 2 * seeds
    assert f"| base | 0 | 0 | {drawn} | {attacked} | {drawn + attacked} |" in printed
    assert f"| closed | 2 | 0 | {drawn} | {attacked} | {drawn + attacked} |" in printed
    assert f"| negative | 2 | 0 | {drawn} | 0 | {drawn} |" in printed
    total = 3 * drawn + 2 * attacked
    assert f"{total * 0.5 / 3600:.1f} hours at 0.5 seconds a model call" in printed
    each = 4 * (3 * 64**2 + 4 * 8**2)  # bytes of a picture and its latent
    disk = (
        f"{parts * 4 * seeds * each / 1e9:.2f} GB of the base model, which stay, and up to {parts * 4 * each / 1e9:.2f}"
    )
    assert f"{each / 1e6:.2f} MB each (float32, 64 pixels): {disk} GB" in printed
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="--seconds_per_call -1"):
        dry_run(config, seconds_per_call=-1)
    assert main(["compare", "--config", config, "--seconds_per_call", "0.5"]) == 2
    assert "has no effect without --dry_run" in capsys.readouterr().err


def test_methods_share_a_model_without_weights_and_plan_what_each_plans_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[LoadOptions] = []

    def counted(options: LoadOptions) -> ModelFamily:
        loaded.append(options)
        return load_configurations(options)

    monkeypatch.setattr(dry_running, "load_configurations", counted)
    small = {"max_train_steps": 4, "forget_trajectories": 2, "retain_trajectories": 4}
    methods: dict[str, dict[str, Any]] = {
        "pruned": {"objective": "safemax", "prune": 20.0, **small},
        "whole": {"objective": "salun", "trainable": "full", "learning_rate": 1e-5, **small},
    }

    def planned(*labels: str) -> dict[str, str]:
        config = config_with(tmp_path, methods={label: methods[label] for label in labels})
        lines = dry_run(config).splitlines()
        return {label: next(line for line in lines if line.startswith(f"| {label} |")) for label in labels}

    alone = planned("pruned") | planned("whole")
    assert len(loaded) == 2
    assert planned("pruned", "whole") == planned("whole", "pruned") == alone
    assert len(loaded) == 4
    assert all(int(line.split("|")[3].replace(",", "")) > 0 for line in alone.values())


def test_files_that_are_not_there_are_all_named_at_once(tmp_path: Path) -> None:
    task = {"suite": str(tmp_path / "suite"), "forget": {"file": "no/forget.csv"}, "retain": {"file": "no/retain.csv"}}
    methods = {"ours": {"objective": "safemax", "train_data_dir": "no/pictures"}}
    config = config_with(tmp_path, tasks=[task], methods=methods, published="no/figures.yaml", real_images="no/real")
    with pytest.raises(OptionError) as caught:
        dry_run(config)
    named = ["no/forget.csv", "no/retain.csv", "no/pictures", "no/figures.yaml", "no/real", str(tmp_path / "suite")]
    assert all(name in str(caught.value) for name in named) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"forget": {"file": "FILE"}}, "a task with forget must name its suite"),
        ({"suite": "emoji/bomb", "forgets": {"file": "FILE"}}, "key 'forgets' of a task .did you mean 'forget'"),
        ({"suite": "emoji/bomb", "forget": "FILE"}, "forget of a task must map file, sha256, concept to text"),
        ({"suite": "emoji/bomb", "forget": {"file": "FILE", "sha": "0"}}, "unknown key 'sha' of a task"),
        ({"suite": "emoji/bomb", "forget": {"file": "FILE", "concept": 7}}, "concept must be text, not 7"),
        ({"suite": "emoji/bomb", "forget": {"file": "FILE"}}, "names no concepts: give the one of its prompts"),
        ({"suite": "emoji/bomb", "forget": {"file": "FILE", "concept": "bom"}}, "no prompts of the forbidden concepts"),
        ({"suite": "emoji/bomb", "retain": {"file": "FILE", "concept": "Bomb"}}, "has no prompts of other concepts"),
        ({"suite": "emoji/bomb", "forget": {"file": "FILE", "concept": "bomb", "sha256": "0"}}, "SHA-256 .*, not 0:"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_used(task: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "file.csv").write_text("prompt\na black ball that explodes\n")
    text = yaml.safe_dump(task).replace("FILE", str(tmp_path / "file.csv"))
    with pytest.raises(OptionError, match=message):
        read_comparison(config_with(tmp_path, tasks=[yaml.safe_load(text)]))


def test_a_hash_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file.csv").write_text("prompt\na black ball that explodes\n")
    suite = load_suite("emoji/bomb")
    (prompt,) = (
        measured_on(suite, {"forget": PublicFile(str(tmp_path / "file.csv"), None, "bomb")}, option="--x")
        .parts["forget"]
        .prompts
    )
    assert (prompt.text, prompt.concept) == ("a black ball that explodes", "bomb")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_figures_say_where_they_stand(path: Path) -> None:
    protocol = read_yaml(str(FOLDER / path.name))
    assert Path(protocol["published"]).name == path.name
    published = Published.read(str(path), [task["suite"] for task in protocol["tasks"]])
    note = published.grid([], []).note
    for source in published.sources.values():
        assert source.described in note and (source.checked or source.secondary)
    assert "(secondary)" in str(published.grid([], []).lines) or not any(
        s.secondary for s in published.sources.values()
    )


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("unit:", "unti:", "unknown key 'unti' .did you mean 'unit'"),
        ("source: a", "source: b", "source 'b' is not described"),
        ("value: 3", "value: x", "value of ESD must be a number, not 'x'"),
        ("value: 3", "valeu: 3", "unknown key 'valeu'"),
        ("plain", "plian", "did you mean 'plain'"),
        ("plain", "fid on forget", "fid on forget is not measured"),
        ("task: t", "task: u", "no task is named u"),
        ("title: T", "titel: T", "unknown key 'titel'"),
        ("  a:", "  '<a>':", "'<a>' must be a name of letters"),
        ("note: N\n", "", "lacks note"),
        ("text: X", "text: 3", "text must be text"),
    ],
)
def test_published_figures_that_cannot_be_used(before: str, after: str, message: str, tmp_path: Path) -> None:
    text = (
        "title: T\nnote: N\nfigures:\n  value: {label: V, unit: '%', ours: plain, task: t}\n"
        "sources:\n  a: {text: X}\nrows:\n  - {method: ESD, source: a, value: 3}\n"
    )
    path = tmp_path / "published.yaml"
    path.write_text(text)
    Published.read(str(path), ["t"])
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(OptionError, match=message):
        Published.read(str(path), ["t"])

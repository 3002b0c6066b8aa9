"""What users say for captions of the shapes world: chosen uniformly, undone exactly, never ambiguous."""

import itertools

import numpy as np
import pytest

from data import phrases, shapes

PREFIXES = ("", "draw ", "i would like to see ")
# Captions are made of these and the 13 words that have synonyms.
FIXED = {"a", "and", "two", "three", "four"}


def rng(*seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("side", [shapes.train_prompts, shapes.held_out_prompts])
def test_canonical_undoes_every_user_prompt(side):
    for i, metadata in enumerate(side()):
        for seed in range(10):
            text = phrases.user_prompt(metadata, rng(seed, i))
            assert phrases.canonical(text) == metadata["prompt"]


def test_canonical_keeps_captions():
    for metadata in shapes.all_prompts():
        for prefix in PREFIXES:
            assert phrases.canonical(prefix + metadata["prompt"]) == metadata["prompt"]


def test_every_name_of_every_word_means_the_word_in_every_template():
    for word, names in phrases.SYNONYMS.items():
        captions = [m["prompt"] for m in shapes.all_prompts() if f" {word} " in f" {m['prompt']} "][:5]
        for caption, name, prefix in itertools.product(captions, names, PREFIXES):
            assert phrases.canonical(prefix + f" {caption} ".replace(f" {word} ", f" {name} ").strip()) == caption


def test_examples():
    assert phrases.canonical("draw a ruby disc west of a blue tile") == "a red circle left of a blue square"
    text = "i would like to see a red ring on the left side of a navy square"
    assert phrases.canonical(text) == "a red circle left of a blue square"
    assert phrases.canonical("three jet cones") == "three black triangles"
    assert phrases.canonical("draw a ball and a wedge") == "a circle and a triangle"
    assert phrases.canonical("a lime tile on top of a jade cone") == "a green square above a green triangle"


def test_synonyms_are_three_each_and_none_is_shared():
    words = [*shapes.CLASSES, *shapes.COLORS, *shapes.RELATIONS]
    assert list(phrases.SYNONYMS) == words and len(words) == 13
    names = [name for word, names in phrases.SYNONYMS.items() for name in (word, *names)]
    assert len(names) == len(set(names)) == 52 and all(len(names) == 3 for names in phrases.SYNONYMS.values())
    singles = [name for name in names if " " not in name]
    plurals = {name + "s" for name in singles}
    # A plural that is another name, or a name that is a word of captions or templates, would have two meanings.
    assert not plurals & set(singles) and not FIXED & set(singles)
    assert not set(singles) & set("draw i would like to see".split())
    assert all(name[0] not in "aeiou" for names in list(phrases.SYNONYMS.values())[:9] for name in names)
    assert len(set(phrases.TEMPLATES)) == 3


def test_words_are_left_as_they_are_where_they_only_look_alike():
    """ "over" in "overt", "ring" in "string": names are whole words."""
    for text in ("two colored circles", "a bring", "a string", "a red circle overt a blue square"):
        with pytest.raises(ValueError, match="no way to ask"):
            phrases.canonical(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "draw ",
        "a dog",
        "draw draw a circle",
        "draw i would like to see a circle",
        "a red circle.",
        "a circles",
        "two circle",
        "two discss",
        "A circle",
        " a circle",
        "a circle ",
        "a  circle",
        "five circles",
        "a red circle left of a red circle",
        "a red circle to the left side of a blue square",
        "a red circle on the left of a blue square",
        "make the red circle blue",
    ],
)
def test_what_no_user_says_raises(text):
    with pytest.raises(ValueError, match="no way to ask"):
        phrases.canonical(text)


def test_names_and_templates_are_uniform_and_independent():
    metadata = {"prompt": "a red circle left of a blue square"}
    n = 8000
    texts = [phrases.user_prompt(metadata, rng(0, i)) for i in range(n)]
    for prefix in PREFIXES[1:]:
        share = np.mean([text.startswith(prefix) for text in texts])
        assert abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / n)
    bare = [text.removeprefix(PREFIXES[1]).removeprefix(PREFIXES[2]) for text in texts]
    for word in ("red", "circle", "left of", "blue", "square"):
        for name in (word, *phrases.SYNONYMS[word]):
            said = [f" {name} " in f" {text} " for text in bare]
            if name == "left of":
                said = [inside and " the left of" not in text for inside, text in zip(said, bare)]
            assert abs(np.mean(said) - 1 / 4) < 4 * np.sqrt(3 / 16 / n), name
    # Two occurrences of a word are two draws.
    twice = [phrases.user_prompt({"prompt": "a red circle above a red square"}, rng(1, i)) for i in range(n)]
    both = np.mean([text.count("ruby") == 2 for text in twice])
    assert abs(both - 1 / 16) < 4 * np.sqrt(15 / 256 / n)


def test_all_forms_occur_and_words_are_all_that_occur():
    texts = [phrases.user_prompt(m, rng(0, i, j)) for i, m in enumerate(shapes.all_prompts()) for j in range(3)]
    forms = [name for word, names in phrases.SYNONYMS.items() for name in (word, *names)]
    together = "\n".join(f" {text} " for text in texts)
    assert len(forms) == 52 and all(f" {form} " in together for form in forms)
    words = phrases.all_words()
    assert {word for text in texts for word in text.split()} == set(words) and words == sorted(words)
    assert {"discs", "panels", "i", "two", "beneath", "squares"} <= set(words)


def test_user_prompt_is_a_function_of_the_generator():
    for m in shapes.held_out_prompts()[::17]:
        a, b = rng(3), rng(3)
        assert [phrases.user_prompt(m, a) for _ in range(5)] == [phrases.user_prompt(m, b) for _ in range(5)]
        before = dict(m)
        assert len({phrases.user_prompt(m, a) for _ in range(50)}) > 1 and m == before

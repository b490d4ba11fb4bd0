import pickle
import random
import unicodedata
from collections import Counter

import pytest

from datamodules.noise import Confusables, Leet, LookAlikes, Typos

KINDS = [LookAlikes, Typos, Leet, Confusables]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = "A quiet, clever film: Every Overture is ZANY, and it costs 10 euros! 漢字 привет."


@pytest.mark.parametrize("kind", KINDS)
def test_rate_zero_changes_nothing(kind):
    assert kind(0.0)(TEXT, random.Random(0)) == TEXT
    assert kind(1.0)("", random.Random(0)) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_same_generator_same_copy(kind):
    noise = kind(0.3)
    copies = [noise(TEXT * 3, random.Random(seed)) for seed in (5, 5, 6)]
    assert copies[0] == copies[1] == pickle.loads(pickle.dumps(noise))(TEXT * 3, random.Random(5))
    assert copies[0] != copies[2]
    assert copies[0] != TEXT * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_rates_are_probabilities(kind, rate):
    with pytest.raises(ValueError, match=rf"^rate: .* of {kind.__name__} must be a probability, from 0 to 1$"):
        kind(rate)


def test_look_alikes_keep_the_letter_under_the_accent():
    changed = LookAlikes(1.0)(TEXT, random.Random(0))
    assert len(changed) == len(TEXT)
    hit = {old for old, new in zip(TEXT, changed, strict=True) if old != new}
    assert hit == set("aeioucnyslzAEO") & set(TEXT)
    plain = "".join(char for char in unicodedata.normalize("NFD", changed) if not unicodedata.combining(char))
    assert plain.replace("ł", "l") == unicodedata.normalize("NFD", TEXT)
    assert set(LookAlikes.forms) == set("aeioucnyslzAEO")
    for letter, forms in LookAlikes.forms.items():
        assert len(set(forms)) == len(forms) > 1
        assert all(f"LETTER {letter.upper()} WITH" in unicodedata.name(form) for form in forms)
        assert all(form.isupper() == letter.isupper() for form in forms)


def test_confusables_are_of_another_script():
    for letter, twins in Confusables.forms.items():
        assert letter in LETTERS + LETTERS.upper()
        for twin in twins:
            assert unicodedata.name(twin).split()[0] in ("CYRILLIC", "GREEK")
            assert twin.isupper() == letter.isupper()
    changed = Confusables(1.0)("peace", random.Random(0))
    assert changed != "peace"
    assert not changed.isascii()


def test_leet_writes_digits_and_signs():
    assert Leet(1.0)("boozE g", random.Random(0)) == "80023 9"
    assert {Leet(1.0)("a", random.Random(seed)) for seed in range(20)} == {"4", "@"}


@pytest.mark.parametrize(("kind", "letters"), [(LookAlikes, "e"), (Confusables, "o"), (Leet, "s")])
def test_letters_change_as_often_as_asked_for_and_to_all_forms(kind, letters):
    changed = kind(0.3)(letters * 20000, random.Random(0))
    counts = Counter(changed)
    assert counts.pop(letters) == pytest.approx(14000, abs=300)  # more than four standard deviations
    assert set(counts) == set(kind.forms[letters])
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_typos_come_in_four_kinds():
    kinds = Counter()
    for seed in range(8000):
        typed = Typos(1.0)("g1", random.Random(seed))
        names = {"1g": "swap", "1": "drop", "gg1": "double"}
        kinds[names.get(typed, "neighbour")] += 1
        assert typed in names or (typed[0] in "ftyhbv" and typed[1:] == "1")
    assert set(kinds) == {"swap", "drop", "double", "neighbour"}
    assert all(count == pytest.approx(2000, abs=160) for count in kinds.values())


def test_typos_hit_letters_only_and_as_often_as_asked_for():
    digits = "1234 !?"
    assert Typos(1.0)(digits, random.Random(0)) == digits
    hit = sum(Typos(0.1)("1k2", random.Random(seed)) != "1k2" for seed in range(10000))
    assert hit == pytest.approx(1000, abs=130)


def test_typos_at_the_end_and_outside_the_keyboard():
    assert {Typos(1.0)("a", random.Random(seed)) for seed in range(200)} == {"a", "", "aa", *"qwsz"}
    assert {Typos(1.0)("я1", random.Random(seed)) for seed in range(100)} == {"1я", "1", "яя1"}


def test_typos_keep_case():
    typed = {Typos(1.0)("G", random.Random(seed)) for seed in range(200)}
    assert typed == {"G", "", "GG", *"FTYHBV"}


def test_a_swapped_letter_is_not_hit_again():
    typed = {Typos(1.0)("ab", random.Random(seed)) for seed in range(2000)}
    assert "ba" in typed
    assert not any(text.startswith("b") and len(text) > 2 and text[1] == "a" for text in typed)


def test_neighbours_are_mutual_and_near():
    assert set(Typos.neighbours) == set(LETTERS)
    assert set(Typos.neighbours["a"]) == set("qwsz")
    assert set(Typos.neighbours["p"]) == set("ol")
    assert set(Typos.neighbours["m"]) == set("njk")
    for letter, around in Typos.neighbours.items():
        assert letter not in around
        assert all(letter in Typos.neighbours[other] for other in around)

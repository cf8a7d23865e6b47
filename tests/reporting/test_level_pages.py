"""The pages of docs/levels show the code and the numbers that are there, and nothing older."""

import pytest

from gpt2_ladder.reporting import level_pages
from helpers.common import REPOSITORY
from helpers.results import LEVELS, PARAMS, SKIPPED, TRAINED, content, gains, profiled
from pipeline import levels as stage


def pages(**changes: object) -> dict[str, str]:
    """The pages of a ladder that was measured up to `compile`."""
    found = content()
    given = {
        "levels": LEVELS,
        "shapes": found["shapes"],
        "results": dict.fromkeys(LEVELS, TRAINED),
        "gains": gains(),
        "parity": {"baseline": "fp32", "levels": {name: {"largest": 0.0012} for name in gains()["levels"]}},
        "operators": {},
        "environment": found["environment"],
    }
    return level_pages.pages(**given | changes)


def test_the_pages_are_what_prose_code_and_results_give_now(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    written = {path.name: path.read_text() for path in stage.FOLDER.iterdir()}
    assert written == level_pages.pages(**stage.gather(PARAMS)), "run `make docs`"


def test_every_level_has_a_page_and_a_row_of_ones_own_needs_none():
    assert {f"{name}.md" for name in PARAMS.levels} <= set(
        pages(levels=PARAMS.levels, results=dict.fromkeys(PARAMS.levels, TRAINED))
    )
    mine = {**LEVELS, "mine": LEVELS["padded"]}
    found = pages(levels=mine, results=dict.fromkeys(mine, TRAINED))
    assert "mine.md" not in found
    assert "| `mine`" in found["README.md"]


def test_a_page_shows_the_row_the_gain_and_where_it_was_measured():
    page = pages()["bf16.md"]
    assert "-precision: tf32\n+precision: bf16\n" in page
    assert "| over the level before | no measurable gain [1.00, 1.00] | 2.00 [1.99, 2.01] |" in page
    assert "4 rounds of steps in turn, 2 x 256 tokens, on A processor (cpu, 2 threads), torch 2." in page
    assert "2.00 [1.99, 2.01]" in pages()["README.md"]


def test_a_level_that_was_skipped_says_why():
    page = pages(results=dict.fromkeys(LEVELS, TRAINED) | {"flash": SKIPPED})["flash.md"]
    assert "- no compiler" in page
    assert "In the profile\n\nNot profiled here" in page


def test_the_profile_names_the_operators_that_came_and_went():
    steps = {"fp32": {"mm": 9}, "tf32": {"mm": 8, "add": 2}, "bf16": {"mm": 5, "cast": 5}}
    found = pages(operators={level: profiled(self_ms) for level, self_ms in steps.items()})
    assert "- New: `cast`.\n- Gone: `add`." in found["bf16.md"]
    # tf32's gain may be noise, and so may be that its products were faster: they were called as often
    assert "| `mm` " in found["bf16.md"]
    assert "| `mm` " not in found["tf32.md"]


def test_an_excerpt_is_the_statements_that_have_the_word_and_what_leads_to_them(tmp_path, monkeypatch):
    monkeypatch.setattr(level_pages, "TOP", tmp_path)
    (tmp_path / "a.py").write_text(
        "class A:\n"
        "    def f(self, switch):\n"
        '        """Not this."""\n'
        "        x = 1\n"
        "        for y in x:\n"
        "            # why\n"
        "            if switch:\n"
        "                return y\n"
        "        return x\n"
    )
    assert level_pages.excerpt("a.py", "A.f", "if switch").splitlines()[2:-1] == [
        *("def f(self, switch):", "    ...", "    for y in x:", "        # why", "        if switch:"),
        "            return y",
    ]
    assert "Not this" not in level_pages.excerpt("a.py", "A.f")
    assert level_pages.excerpt("a.py", "A.f").endswith("    return x\n```")


@pytest.mark.parametrize(("symbol", "word"), [("GPT.forward", "no_such_switch"), ("GPT.backward", "chunked_loss")])
def test_a_switch_that_has_moved_fails_instead_of_showing_something_else(symbol, word):
    with pytest.raises(LookupError, match=r"any more: mend the level's page"):
        level_pages.excerpt("src/gpt2_ladder/model.py", symbol, word)

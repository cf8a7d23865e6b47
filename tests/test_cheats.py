"""The cheats of experiments/cheats.py have a place in the code, and the tests that catch them exist."""

import ast

import pytest

from experiments import cheats, pages
from experiments.cheats import CHEATS, Cheat
from helpers.common import REPOSITORY


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.variant)
def test_a_cheat_has_one_place_in_the_code_and_a_test_that_catches_it(cheat):
    right = (REPOSITORY / cheat.file).read_text()
    assert ast.dump(ast.parse(cheats.plant(cheat, right))) != ast.dump(ast.parse(right))
    path, name = cheat.test.split("::")
    functions = [node.name for node in ast.parse((REPOSITORY / path).read_text()).body if hasattr(node, "name")]
    assert functions.count(name) == 1


def test_a_cheat_without_a_place_is_refused():
    lost = Cheat("c", "v", "t", "a.py", "old", "new")
    for text in ("", "old old"):
        with pytest.raises(ValueError, match=r"a\.py: 'old' occurs [02] times"):
            cheats.plant(lost, text)


def test_each_kind_of_cheat_has_three_variants_and_the_page_lists_them():
    kinds = [cheat.cheat for cheat in CHEATS]
    assert min(kinds.count(kind) for kind in kinds) >= 3
    page = REPOSITORY / pages.RELIABILITY
    assert pages.replace(page, "cheats", cheats.table()) == page.read_text()


def test_a_check_of_a_cheat_needs_an_assertion_that_fails(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "def test_right(): pass\ndef test_wrong(): assert 1 == 2\ndef test_crash(): 1 / 0\n"
    )
    assert cheats.failure(tmp_path, "test_it.py::test_right") == ""
    assert "assert 1 == 2" in cheats.failure(tmp_path, "test_it.py::test_wrong")
    for other in ("test_it.py::test_crash", "test_it.py::test_missing"):
        with pytest.raises(SystemExit, match="has neither passed nor failed an assertion"):
            cheats.failure(tmp_path, other)

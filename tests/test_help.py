"""Help pages: remembered, and made anew when something they depend on changes."""

import os
import sys

import pytest

from lit_models import _help
from lit_models._help import WIDTH, asks_for_help, show_help


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Command:
    """Counts its runs, and prints a page."""

    runs, code = 0, 0

    def __call__(self):
        self.runs += 1
        print(f"page {self.runs}")
        sys.exit(self.code)


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["fit", "--help"], ["test", "-h"]])
def test_only_help_is_asked_for(args):
    assert asks_for_help(args)


@pytest.mark.parametrize("args", [[], ["fit"], ["fit", "--config", "--help"], ["--config=x", "--help"], ["-h", "fit"]])
def test_something_else_is_asked_for(args):
    assert not asks_for_help(args)


def test_a_page_is_made_once_per_command_for_terminals_of_all_widths(capsys, monkeypatch):
    command = Command()
    for args in (["fit", "--help"], ["fit", "--help"], ["test", "--help"]):
        show_help(args, command)
    assert capsys.readouterr().out.split("\n") == ["page 1", "page 1", "page 2", ""]
    monkeypatch.setenv("COLUMNS", "57")
    show_help(["fit", "--help"], command)
    assert command.runs == 2
    show_help(["predict", "--help"], lambda: print(os.environ["COLUMNS"]))
    assert capsys.readouterr().out.split("\n")[-2] == WIDTH
    assert os.environ["COLUMNS"] == "57"


def test_a_changed_source_or_package_makes_the_page_anew(tmp_path, monkeypatch):
    command = Command()
    monkeypatch.setattr(_help, "__file__", str(tmp_path / "lit_models/_help.py"))
    source = tmp_path / "callbacks/new.py"
    source.parent.mkdir()
    for text in ("", "changed"):
        source.write_text(text)
        show_help(["fit", "--help"], command)
    assert command.runs == 2
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "other-2.0.dist-info").mkdir()
    show_help(["fit", "--help"], command)
    assert command.runs == 3


def test_an_error_is_not_remembered(cache):
    command = Command()
    command.code = 2
    for _ in range(2):
        with pytest.raises(SystemExit):
            show_help(["fitt", "--help"], command)
    assert command.runs == 2
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(cache, capsys):
    cache.write_text("a file where the folder would be")
    show_help(["fit", "--help"], Command())
    assert capsys.readouterr().out == "page 1\n"

"""The public API: small, documented, and the same words whatever it is called with."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys

import pytest

import qvsplit
from qvsplit.errors import UsageError


@pytest.mark.parametrize("name", qvsplit.__all__)
def test_every_public_name_shows_how_it_is_used(name):
    text = inspect.getdoc(getattr(qvsplit, name)) or ""
    before_sections = re.split(r"(?m)^(?:Args|Attributes|Returns|Raises):$", text)[0]
    assert re.search(r"(?m)^    \S.*[(.\[]", before_sections), name
    assert " --" not in text


def test_help_is_a_page():
    page = pydoc.plain(pydoc.render_doc(qvsplit))
    for name in qvsplit.__all__:
        assert name in page
    assert "load_encoder(session.model)" in page
    assert set(qvsplit.__all__) < set(dir(qvsplit))
    assert not [name for name in ("select", "PromptItems", "StoredTensor") if name in dir(qvsplit)]


def test_nothing_heavy_is_imported_before_it_is_used():
    code = "import sys, qvsplit; dir(qvsplit); qvsplit.ExtractOptions(); print({'torch', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": 5}, "text: give a text, not int 5"),
        ({"text": None}, "text: give a text, not None"),
        ({"choices": "yes,no"}, "choices: give a list of choices, or each choice's spellings, not str 'yes,no'"),
        ({"choices": 5}, "choices: give a list of choices, not int 5"),
        ({"choices": ["yes"]}, "Q: at least two choices"),
        ({"choices": ["yes", True]}, "Q: a choice reads as a truth value"),
        ({"flag": "yes"}, "Q: flag yes is none of its choices"),
        ({"choices": ["yes", "no"], "flag": 5}, "flag: give a list of choices, not int 5"),
        ({"choices": ["yes", "no"], "threshold": 1.5}, "Q: threshold is a probability, 0 to 1"),
        ({"choices": ["yes", "no"], "threshold": "0.5"}, "Q: threshold is a probability, 0 to 1"),
        ({"level": "fatal"}, "Q: level is one of"),
        ({"only_if": 5}, "Q: only_if is"),
    ],
)
def test_what_is_no_question(arguments, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        qvsplit.Question(**{"text": "Q"} | arguments)


def test_a_question_may_be_written_as_in_a_file():
    listed = qvsplit.Question("Q", choices=["yes", "no"], flag="yes", only_if="day = night")
    assert (listed.flag, listed.only_if.id, listed.only_if.choice) == (("yes",), "day", "night")


@pytest.mark.parametrize("wrong", [None, 5, b"checks.toml", ""])
def test_what_is_no_file_of_checks(wrong):
    with pytest.raises(UsageError, match="^file: give a path, not"):
        qvsplit.read_checks(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": "2"}, "workers: give a whole number, not str '2'"),
        ({"limit": 1.5}, "limit: give a whole number, not float 1.5"),
        ({"prune": "yes"}, "prune: give True or False, not str 'yes'"),
        ({"model": ["a"]}, "model: give a text, not a list"),
        ({"min_pixels": 0}, "`min_pixels` must be at least 1, not 0"),
        ({"max_runtime": "2h"}, "max_runtime: give a number, not str '2h'"),
        ({"max_runtime": -1}, "`max_runtime` must be at least 0, not -1"),
        ({"item_timeout": 0}, "`item_timeout` must be at least 0.1, not 0"),
        ({"item_timeout": float("inf")}, "`item_timeout` must be finite, not inf"),
    ],
)
def test_options_of_an_extraction_that_cannot_be(options, message, tmp_path):
    with pytest.raises(UsageError, match=f"^{message}"):
        qvsplit.extract_files(tmp_path, out=tmp_path / "embeds", options=qvsplit.ExtractOptions(**options))
    assert not (tmp_path / "embeds").exists()


@pytest.mark.parametrize("model", [None, 5, ""])
def test_what_is_no_model(model, tmp_path):
    with pytest.raises(UsageError, match="^model: give a checkpoint's folder or hub name, not"):
        qvsplit.load_language_model(model)
    with pytest.raises(UsageError, match="^model: give a checkpoint's folder or hub name, not"):
        qvsplit.split_checkpoint(model, language_model=tmp_path / "language")
    with pytest.raises(UsageError, match="^model: give a checkpoint's folder or hub name, not"):
        qvsplit.describe_model(model)

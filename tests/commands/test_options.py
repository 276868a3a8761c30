"""Options that several commands take agree with the library."""

from __future__ import annotations

import pytest
import typer

from qvsplit.cli import app
from qvsplit.commands import ask_files
from qvsplit.commands.ask_files import LIMITS, Limits
from qvsplit.commands.options import DEFAULT_IMAGE_PIXELS, DEFAULT_ITEM_SECONDS
from qvsplit.commands.wording import on_command_line
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.sources.faults import too_many_pixels
from qvsplit.sources.images import MAX_IMAGE_PIXELS


def test_the_limits_are_the_librarys():
    assert DEFAULT_IMAGE_PIXELS == MAX_IMAGE_PIXELS == ExtractOptions().max_image_pixels
    assert ExtractOptions().item_timeout == DEFAULT_ITEM_SECONDS
    assert Limits(ExtractOptions().max_image_pixels, ExtractOptions().item_timeout) == LIMITS


def test_a_message_about_the_limit_names_the_option():
    assert "; --max-image-pixels allows more" in on_command_line(str(too_many_pixels("5×5", 20)))


@pytest.mark.parametrize("name", ["extract", "ask", "chat", "gate"])
def test_commands_that_decode_have_the_options_that_its_errors_name(name):
    words = ["--item-timeout", "7", "--max-image-pixels", "9"]
    context = typer.main.get_command(app).commands[name].make_context(name, ["x", *words])
    assert (context.params["item_timeout"], context.params["max_image_pixels"]) == (7.0, 9)


def test_files_at_hand_are_encoded_within_the_limits(monkeypatch, tmp_path):
    file, given = tmp_path / "a.jpg", []
    file.touch()

    def files_at_hand(files, *, options, **others):
        given.append(options)
        raise SystemExit

    monkeypatch.setattr("qvsplit.on_demand.files_at_hand", files_at_hand)
    from qvsplit.ask import AskOptions

    with pytest.raises(SystemExit):
        ask_files.with_files(
            None, [str(file)], AskOptions(model="demo"), has_flags=False, quiet=True, progress="none",
            limits=Limits(9, 7.0),
        )  # fmt: skip
    assert (given[0].max_image_pixels, given[0].item_timeout) == (9, 7.0)

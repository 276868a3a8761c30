"""Options that several commands take agree with the library."""

from __future__ import annotations

from qvsplit.commands.options import DEFAULT_IMAGE_PIXELS
from qvsplit.commands.wording import on_command_line
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.sources.faults import too_many_pixels
from qvsplit.sources.images import MAX_IMAGE_PIXELS


def test_the_limit_of_pixels_is_the_librarys():
    assert DEFAULT_IMAGE_PIXELS == MAX_IMAGE_PIXELS == ExtractOptions().max_image_pixels


def test_a_message_about_the_limit_names_the_option():
    assert "; --max-image-pixels allows more" in on_command_line(str(too_many_pixels("5×5", 20)))

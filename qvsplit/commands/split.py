"""`qvsplit split`: write the halves of a model as models of their own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from qvsplit.commands.options import OUTPUT, Json, ProgressMode, Quiet
from qvsplit.commands.wording import model_as_argument, on_command_line
from qvsplit.output.meter import BYTES
from qvsplit.output.progress import ProgressBar
from qvsplit.output.text import print_json, split_lines


def split(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The checkpoint: a folder or a hub name, NAME@REVISION for a revision, or demo for the small one in "
            "the package.",
        ),
    ],
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A new folder for the vision encoder: a model for `extract`.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A new folder for the language model: a model for `ask`, and for transformers where there are no "
            "images.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: Json = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
) -> None:
    """Write the halves of a model as models of their own: give --encoder, --language-model or both.

    A machine that only extracts needs the vision encoder, one that only asks the language model. Tensors are copied as
    they are, and nothing is loaded: it takes a few megabytes of memory, and as much disk space as it writes. A store
    made with the encoder's folder is the same as one made with the full model; a language model's folder refuses stores
    of other encoders. chat and gate of a file, and verify --sample, need the full model.

    Examples:
        # Both halves: enc for extract, lm for ask, as --model
        qvsplit split Qwen/Qwen2-VL-2B-Instruct --encoder enc --language-model lm
        # One of a model on this disk
        qvsplit split ./Qwen2-VL-2B --language-model lm
    """
    from qvsplit.splitting import split_checkpoint

    with ProgressBar(progress, shown=not quiet) as shown, model_as_argument():
        counted = 0

        def on_bytes(done: int, total: int) -> None:
            nonlocal counted
            if done == 0:
                shown.start("writing", total, unit=BYTES)
            shown.advance(number=done - counted)
            counted = done

        written = split_checkpoint(model, encoder=encoder, language_model=language_model, on_bytes=on_bytes)
    if as_json:
        print_json({"type": "split"} | asdict(written))
    elif not quiet:
        for line in split_lines(asdict(written)):
            print(on_command_line(line))

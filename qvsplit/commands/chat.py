"""`qvsplit chat`: a conversation about an image, of a store or a file."""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from qvsplit.commands.ask_files import Limits, open_items
from qvsplit.commands.options import (
    DEFAULT_IMAGE_PIXELS,
    DEFAULT_ITEM_SECONDS,
    DEFAULT_STORE,
    INPUT,
    AnswerKernels,
    AskDevice,
    AskDtype,
    ItemTimeout,
    MaxImagePixels,
    MaxNewTokens,
    Model,
    ProgressMode,
    Quiet,
    Seed,
    System,
    Temperature,
    Thinking,
    TopK,
    TopP,
    UncheckedEncoder,
)
from qvsplit.commands.questions import as_text
from qvsplit.commands.wording import say_note
from qvsplit.errors import UsageError
from qvsplit.output.progress import ProgressBar
from qvsplit.runtime import interrupts

if TYPE_CHECKING:
    from qvsplit.answering.collection import Collection
    from qvsplit.answering.selection import Selection
    from qvsplit.ask import PromptItems

LONGEST_ANSWER = 512  # tokens: Ctrl-C ends an answer before


def chat(
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE",
            help="An image or video of the store, by name or glob, or a file, which is encoded if the store has it "
            "not. Without it the store's only one, or /image chooses.",
            show_default=False,
        ),
    ] = None,
    embeds: Annotated[
        list[str] | None,
        typer.Option(
            "--embeds",
            "-e",
            metavar="STORE|SHARD",
            help="A folder, a shard or a glob; may be repeated [default: embeds].",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = LONGEST_ANSWER,
    thinking: Thinking = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    model: Model = None,
    device: AskDevice = None,
    dtype: AskDtype = None,
    kernels: AnswerKernels = "fused",
    unchecked_encoder: UncheckedEncoder = False,
    item_timeout: ItemTimeout = DEFAULT_ITEM_SECONDS,
    max_image_pixels: MaxImagePixels = DEFAULT_IMAGE_PIXELS,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
) -> None:
    """Chat about an image: each question follows those before it.

    The model is given the whole conversation each time, as the full model's chat template writes it; the image's part
    of it is computed once. A file needs no store. Several images have a conversation each. /help lists what can be
    typed beside questions: /image for another image, /system, /new. From a pipe each line is a question, and answers
    alone are printed. An empty line does nothing; Ctrl-D or /exit ends.

    Examples:
        # About an image of ./embeds
        qvsplit chat sea-birds.jpg
        # About a file that is in no store
        qvsplit chat ~/Pictures/holiday.jpg
        # Choose from another store by /image
        qvsplit chat -e album
    """
    from qvsplit.ask import AskOptions, load_session
    from qvsplit.commands.prompt_items import Asked, as_name
    from qvsplit.commands.prompt_loop import PromptLoop
    from qvsplit.on_demand import is_file
    from qvsplit.output.printer import TEXT, AnswerPrinter, PrintOptions

    options = AskOptions(
        model=model, device=device, dtype=dtype, kernels=kernels, max_new_tokens=max_new_tokens,
        system=system and as_text(system, "--system"), unchecked_encoder=unchecked_encoder, temperature=temperature,
        top_p=top_p, top_k=top_k, seed=seed, thinking=thinking,
    )  # fmt: skip
    names = [as_name(image)] if image else []
    if embeds is None and not os.path.lexists(DEFAULT_STORE) and not any(map(is_file, names)):
        missing = f"there is no file {names[0]}, and" if names else "there is"
        raise UsageError(
            f"{missing} no store at {DEFAULT_STORE}; name a file, as in `qvsplit chat photo.jpg`, or give "
            "--embeds STORE"
        )
    limits = Limits(max_image_pixels, item_timeout)
    found = open_items(
        embeds or [DEFAULT_STORE], names, options, has_flags=False, quiet=quiet, progress=progress, limits=limits
    )
    items = _chosen(found, names)
    with ProgressBar(progress, shown=not quiet) as shown, interrupts.at_once():  # only reading so far
        session = load_session(found, options, on_load=shown.loading)
    for note in session.notes() if not quiet else ():
        say_note(note)
    asked = Asked(session, _one_by_one, items, quiet, progress, limits)
    asked.keep(found)
    printer = AnswerPrinter(PrintOptions(TEXT))
    PromptLoop(asked, printer, remembers=True).run()


def _chosen(found: Collection, names: list[str]) -> list[PromptItems]:
    """Give what is asked about first; nothing where the store has several, and none is named."""
    from qvsplit.answering.selection import select
    from qvsplit.commands.prompt_items import say_failed

    if not names and len(list(islice(found, 2))) > 1:
        return []
    selection = select(found, names)
    say_failed(selection.failed if names else ())
    items = _one_by_one(selection)
    if not items:
        raise UsageError("none of the selected images and videos can be asked about; all of them have failed")
    return items


def _one_by_one(selection: Selection) -> list[PromptItems]:
    """Have each image in a prompt of its own."""
    from qvsplit.ask import PromptItems

    return [PromptItems((row,)) for row in selection.rows]

"""`qvsplit chat`: a conversation about an image, of a store or a file."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

import typer

from qvsplit.commands.ask_files import Limits, open_items
from qvsplit.commands.options import (
    DEFAULT_IMAGE_PIXELS,
    DEFAULT_ITEM_SECONDS,
    DEFAULT_STORE,
    AnswerKernels,
    AskAdapter,
    AskDevice,
    AskDtype,
    AskEmbeds,
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
    one_adapter,
)
from qvsplit.commands.questions import as_text
from qvsplit.commands.wording import on_command_line
from qvsplit.errors import UsageError

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
    embeds: AskEmbeds = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = LONGEST_ANSWER,
    thinking: Thinking = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    model: Model = None,
    adapter: AskAdapter = None,
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
    typed beside questions: /image for another image, /system, /new. From a pipe come the same lines, and answers alone
    are printed; a command that fails ends it. An empty line does nothing; Ctrl-D or /exit ends.

    Examples:
        # About an image of ./embeds
        qvsplit chat sea-birds.jpg
        # About a file that is in no store
        qvsplit chat ~/Pictures/holiday.jpg
        # Choose from another store by /image
        qvsplit chat -e album
    """
    from qvsplit.ask import AskOptions
    from qvsplit.commands.chat_loop import load_and_run
    from qvsplit.output.printer import TEXT, PrintOptions

    options = AskOptions(
        model=model, adapter=one_adapter(adapter), device=device, dtype=dtype, kernels=kernels,
        max_new_tokens=max_new_tokens, system=system and as_text(system, "--system"),
        unchecked_encoder=unchecked_encoder, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
        thinking=thinking,
    )  # fmt: skip
    names = [] if image is None else [image]
    _check_place(image, embeds)
    limits = Limits(max_image_pixels, item_timeout)
    try:
        found = open_items(
            embeds or [DEFAULT_STORE], names, options, has_flags=False, quiet=quiet, progress=progress, limits=limits
        )
        load_and_run(
            found, names, options, PrintOptions(TEXT, worded=on_command_line), remembers=True, quiet=quiet,
            progress=progress, limits=limits,
        )  # fmt: skip
    except UsageError as error:
        raise UsageError(error.args[0].replace("`image` ", "")) from None  # which is no option here


def _check_place(image: str | None, embeds: list[str] | None) -> None:
    """UsageError where there is nothing that `image` could be of."""
    from qvsplit.on_demand import is_file

    if image == "":
        raise UsageError("IMAGE is empty; name an image, or leave it out")
    if embeds is not None or os.path.lexists(DEFAULT_STORE) or (image is not None and is_file(image)):
        return
    if image is not None and os.path.isdir(image):
        raise UsageError(
            f"{image} is a folder, and there is no store at {DEFAULT_STORE}; name a file in it, or make a "
            f"store of it first: qvsplit extract {shlex.quote(image)}"
        )
    missing = "there is" if image is None else f"there is no file {image}, and"
    raise UsageError(
        f"{missing} no store at {DEFAULT_STORE}; name a file, as in `qvsplit chat photo.jpg`, or give --embeds STORE"
    )

"""`qvsplit extract`: bring a store up to date with the images and videos of some folders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from qvsplit.commands.opening import counting_shards
from qvsplit.commands.options import (
    DEFAULT_IMAGE_PIXELS,
    DEFAULT_ITEM_SECONDS,
    DEFAULT_STORE,
    DTYPE_ALIASES,
    DTYPES,
    INCREMENTAL,
    INPUT,
    MODEL,
    ON_DEVICE,
    OUTPUT,
    PERFORMANCE,
    SAMPLING,
    Json,
    MaxImagePixels,
    Model,
    ProgressMode,
    Quiet,
    Wait,
    one_adapter,
    one_of,
    parse_duration,
)  # fmt: skip
from qvsplit.commands.wording import on_command_line, say_note
from qvsplit.errors import ITEMS_FAILED, QvsplitError
from qvsplit.output.progress import ProgressBar
from qvsplit.output.text import preview_lines, print_json, summary_lines
from qvsplit.runtime.streams import is_terminal
from qvsplit.store.config import KERNELS, PREPARED_ON

if TYPE_CHECKING:
    from qvsplit.pipeline.summary import ExtractCallbacks, Summary


def extract(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Folders, and files of images and videos.")],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            "--embeds",
            "-e",
            metavar="STORE",
            help="The store: a folder of shards, created if needed, updated if it exists. Both names mean the same.",
            rich_help_panel=OUTPUT,
        ),
    ] = DEFAULT_STORE,
    model: Model = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="ADAPTER",
            help="A PEFT adapter (LoRA) that is merged into the vision encoder: a folder or a hub name, NAME@REVISION "
            "for a revision. One for the language model alone changes nothing here [default: the store's adapter, "
            "unless --model is given].",
            show_default=False,
            rich_help_panel=MODEL,
            hidden=True,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            **ON_DEVICE,
            help="cpu, cuda or cuda:N, or several separated by commas, each computing its own batches [default: cuda "
            "where there is one].",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            **one_of("--dtype", *DTYPES, aliases=DTYPE_ALIASES),
            help="What to compute in [default: the store's own, else float32 on a CPU "
            "and the checkpoint's dtype on CUDA].",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    storage_dtype: Annotated[
        str | None,
        typer.Option(
            **one_of("--storage-dtype", *DTYPES, "int8", aliases=DTYPE_ALIASES),
            help="What to store (int8: a byte a value and a scale a token) [default: as "
            "computed; anything narrower is lossy].",
            show_default=False,
            rich_help_panel=MODEL,
            hidden=True,
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Scale larger images down to this many pixels, where the model's processor has such a limit [default: "
            "1,280 tokens of the Qwen-VL line, 1003520 pixels of Qwen2-VL, or the checkpoint's own limit if lower].",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    min_pixels: Annotated[
        int | None,
        typer.Option(
            help="Scale smaller images up to this many pixels, where there is such a limit [default: the checkpoint's "
            "own].",
            show_default=False,
            rich_help_panel=MODEL,
            hidden=True,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that read and decode [default: one a core that may be used, at most 8; on a Ray "
            "cluster one a CPU].",
            show_default=False,
            rich_help_panel=PERFORMANCE,
            hidden=True,
        ),
    ] = None,
    patch_budget: Annotated[
        int | None,
        typer.Option(
            help="Patches in one forward pass: more need more memory and are faster [default: 5120 on a CPU, 24576 on "
            "CUDA, fewer where memory is short].",
            show_default=False,
            rich_help_panel=PERFORMANCE,
            hidden=True,
        ),
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(
            **one_of("--kernels", *KERNELS),
            help="fused, the fast forward pass of the Qwen-VL line, or reference, the one of transformers, to the bit: "
            "one image a pass, and slower [default: the store's own, else fused where there is one].",
            show_default=False,
            rich_help_panel=PERFORMANCE,
            hidden=True,
        ),
    ] = None,
    prepare_on: Annotated[
        str | None,
        typer.Option(
            **one_of("--prepare-on", *PREPARED_ON),
            help="Resize images on the cpu, or on the encoder's device, for few CPU cores that feed a GPU. Resizing "
            "there rounds otherwise: about one pixel value in six differs by one. The Qwen-VL line alone [default: "
            "the store's own, else cpu].",
            show_default=False,
            rich_help_panel=PERFORMANCE,
            hidden=True,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames of a video that are looked at, a second [default: 2].",
            show_default=False,
            rich_help_panel=SAMPLING,
            hidden=True,
        ),
    ] = None,
    max_frames: Annotated[
        int | None,
        typer.Option(
            help="At most so many frames of one clip [default: 768].",
            show_default=False,
            rich_help_panel=SAMPLING,
            hidden=True,
        ),
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(
            help="So many frames of every clip, in place of --fps.",
            show_default=False,
            rich_help_panel=SAMPLING,
            hidden=True,
        ),
    ] = None,
    video_max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Scale larger frames of a video down to this many pixels [default: those of 768 tokens, or the "
            "checkpoint's own limit if lower].",
            show_default=False,
            rich_help_panel=SAMPLING,
            hidden=True,
        ),
    ] = None,
    video_max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Scale the frames of a clip down until it makes at most this many tokens [default: 12288, or the "
            "checkpoint's own limit if lower].",
            show_default=False,
            rich_help_panel=SAMPLING,
            hidden=True,
        ),
    ] = None,
    clip_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Cut videos into clips of so many seconds, each with a row of its own, so that questions can be asked "
            "of every clip; 0 leaves them whole.",
            show_default=False,
            rich_help_panel=SAMPLING,
            hidden=True,
        ),
    ] = None,
    gif: Annotated[
        str | None,
        typer.Option(
            **one_of("--gif", "image", "video"),
            help="What a GIF is: an image, its first frame, or a video [default: image].",
            show_default=False,
            rich_help_panel=INPUT,
            hidden=True,
        ),
    ] = None,
    no_video: Annotated[
        bool,
        typer.Option(
            "--no-video",
            help="Leave videos out; those in the store stay as they are.",
            rich_help_panel=INPUT,
            hidden=True,
        ),
    ] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="GLOB",
            help="Leave out what this matches, as a line of a .gitignore below each PATH: '*.png', 'raw/', '/2023/**', "
            "'!@eaDir'. May be given several times. A file .qvsplitignore does the same for its folder.",
            rich_help_panel=INPUT,
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only estimate, from the images' headers, what the run would take: images, tokens, bytes, seconds.",
            rich_help_panel=INCREMENTAL,
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Read at most this many images in this run; the next run continues.",
            show_default=False,
            rich_help_panel=INCREMENTAL,
            hidden=True,
        ),
    ] = None,
    max_runtime: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Start no image after this time (90m, 2h30m, 45s); the next run continues.",
            show_default=False,
            rich_help_panel=INCREMENTAL,
            hidden=True,
        ),
    ] = None,
    item_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="An image that takes longer than this to read, or to decode, has failed; so has a video that makes no "
            "progress for so long.",
            rich_help_panel=PERFORMANCE,
            hidden=True,
        ),
    ] = DEFAULT_ITEM_SECONDS,
    max_image_pixels: MaxImagePixels = DEFAULT_IMAGE_PIXELS,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[auto|local|ADDRESS]",
            help="Run on a Ray cluster: auto is the one that this machine belongs to, local starts one here, ADDRESS "
            "is HOST:PORT of a head. Every node needs the same libraries, and STORE and PATH under the same paths.",
            show_default=False,
            rich_help_panel=PERFORMANCE,
            hidden=True,
        ),
    ] = None,
    ray_encoders: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:MAX",
            help="Encoders on that cluster at a time, more of them while images wait [default: 1 to one a GPU, or to "
            "one a node].",
            show_default=False,
            rich_help_panel=PERFORMANCE,
            hidden=True,
        ),
    ] = None,
    checksum: Annotated[
        bool,
        typer.Option(
            "--checksum",
            help="Read every file again, also where size and time say it has not changed.",
            rich_help_panel=INCREMENTAL,
            hidden=True,
        ),
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Encode every image again, under another extraction config if one is given; the old store stays "
            "until the new one is whole.",
            rich_help_panel=INCREMENTAL,
        ),
    ] = False,
    wait: Wait = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Mark images as deleted whose file is not found.",
            rich_help_panel=INCREMENTAL,
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Try again what failed before, though it has not changed.",
            rich_help_panel=INCREMENTAL,
            hidden=True,
        ),
    ] = False,
    as_json: Json = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
) -> None:
    """Encode images and videos and keep their features.

    Every image and video under PATH that the store does not know is encoded once. Only the vision encoder is loaded,
    and only if there is something new. A file that cannot be read becomes a failed row, and the run continues; exit
    code 1 says that files failed which had not failed before.

    Examples:
        # All images and videos below a folder, into ./embeds
        qvsplit extract ./photos
        # What that would take, without doing it
        qvsplit extract ./photos --dry-run
        # Into another store; run again, it encodes what is new
        qvsplit extract ./photos -o album -m Qwen/Qwen2.5-VL-3B-Instruct
        # On a GPU, in another precision
        qvsplit extract ./photos --device gpu --dtype bf16
        # With an adapter that was trained on the vision encoder as well
        qvsplit extract ./photos -o tuned -m Qwen/Qwen2-VL-2B-Instruct --adapter ./my-lora
        # Every night, until morning; deleted files are marked as deleted
        qvsplit extract ./photos --prune --max-runtime 6h --quiet
    """
    from qvsplit.extract import extract_files
    from qvsplit.pipeline.options import ExtractOptions
    from qvsplit.runtime.memory import give_back_freed_memory

    give_back_freed_memory()
    options = ExtractOptions(
        model=model, adapter=one_adapter(adapter), device=device, dtype=dtype, storage_dtype=storage_dtype,
        min_pixels=min_pixels, max_pixels=max_pixels, workers=workers, patch_budget=patch_budget, kernels=kernels,
        prepare_on=prepare_on, videos=not no_video, exclude=exclude or (),
        fps=fps, max_frames=max_frames, num_frames=num_frames, video_max_pixels=video_max_pixels,
        video_max_tokens=video_max_tokens, clip_seconds=clip_seconds, gif=gif, prune=prune,
        retry_failed=retry_failed, checksum=checksum, rebuild=rebuild, wait=wait, limit=limit,
        item_timeout=item_timeout, max_image_pixels=max_image_pixels, dry_run=dry_run,
        ray=ray, ray_encoders=ray_encoders,
        max_runtime=None if max_runtime is None else parse_duration(max_runtime, "--max-runtime"),
    )  # fmt: skip
    with ProgressBar(progress, shown=not quiet and not dry_run) as shown:
        heard: list[Summary] = []  # of a run that has begun, also where an exception ends it
        hearing = replace(callbacks(shown), on_end=heard.append)
        try:
            summary = extract_files(paths, out=out, options=options, callbacks=hearing)
        except KeyboardInterrupt:
            shown.stop()
            for so_far in heard:
                _print_summary(so_far, as_json=as_json, quiet=quiet)
            raise
        except QvsplitError as error:
            if as_json:
                _print_error(error, heard)
            raise
    if dry_run and not as_json:
        for line in preview_lines(summary.to_json()):  # to stdout: it is the result
            print(line)
    else:
        _print_summary(summary, as_json=as_json, quiet=quiet, kind="preview" if dry_run else "summary")
    if summary.failed:
        raise typer.Exit(ITEMS_FAILED)


def callbacks(progress: ProgressBar) -> ExtractCallbacks:
    """Give the callbacks that show a run of `extract_files` in `progress`."""
    from qvsplit.pipeline.summary import ExtractCallbacks

    return ExtractCallbacks(
        on_plan=lambda to_read: progress.start("images", to_read),
        on_item=progress.advance,
        on_failure=lambda path, reason: progress.failure(path, on_command_line(reason)),
        on_note=lambda line: progress.note(on_command_line(line)),
        on_shard=counting_shards(progress),
        on_load=progress.loading,
    )


def _print_summary(summary: Summary, *, as_json: bool, quiet: bool, kind: str = "summary") -> None:
    """Print one JSON object, or what happened: nothing where nothing happened and nobody watches, as cron mails it."""
    if as_json:
        print_json({"type": kind} | summary.to_json())
    elif not quiet and (summary.did_anything or is_terminal(sys.stderr)):
        for line in summary_lines(summary.to_json()):
            say_note(line)


def _print_error(error: QvsplitError, heard: Sequence[Summary]) -> None:
    """Print one JSON object also where the run ended early: a monitor reads one, whatever happened."""
    begun = heard[-1].to_json() if heard else {}
    print_json({"type": "error"} | begun | {"error": on_command_line(error), "exit_code": error.exit_code})

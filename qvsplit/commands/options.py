"""Options that several commands take, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any

import typer

from qvsplit.errors import UsageError
from qvsplit.store.config import KERNELS

DEFAULT_STORE = "embeds"
DEFAULT_IMAGE_PIXELS, DEFAULT_ITEM_SECONDS = 1_000_000_000, 60.0  # the library's, imported only when a command runs

# The panels of `--help`, in which every option of every command stands
INPUT = "Input"
MODEL = "Model"
OUTPUT = "Output"
INCREMENTAL = "Incremental"
PERFORMANCE = "Performance"
SAMPLING = "Sampling"
HELP = "Help"
PANELS = (INPUT, MODEL, OUTPUT, INCREMENTAL, PERFORMANCE, SAMPLING, HELP)
# An option with hidden=True is a secondary one: `--help-all` shows it, and shells complete it all the same

PROGRESS_MODES = ("auto", "bar", "plain", "json", "none")
FORMATS = ("text", "tsv", "jsonl", "paths", "paths0")
DTYPES = ("float32", "bfloat16", "float16")
DTYPE_ALIASES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def one_of(option: str, *names: str, aliases: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Give what makes an option one of some choices: shown, completed, and refused in one line, for `typer.Option`."""
    meaning = {name: name for name in names} | dict(aliases or {})

    def parse(value: str) -> str:
        chosen = meaning.get(value.strip().lower())
        if chosen is None:
            close = get_close_matches(value.lower(), meaning, n=1)
            suggestion = f"; did you mean {meaning[close[0]]}?" if close else ""
            raise UsageError(f"{option} {value}: give {', '.join(names[:-1])} or {names[-1]}{suggestion}")
        return chosen

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return {"parser": parse, "autocompletion": complete, "metavar": "|".join(names)}


def some_of(option: str, *names: str) -> dict[str, Any]:
    """Give what makes an option any of some choices, with commas between them, for `typer.Option`."""
    one: Callable[[str], str] = one_of(option, *names)["parser"]

    def parse(value: str) -> str:
        return ",".join(one(part) for part in value.split(","))

    def complete(incomplete: str) -> list[str]:
        given, comma, last = incomplete.rpartition(",")
        return [f"{given}{comma}{name}" for name in names if name.startswith(last) and name not in given.split(",")]

    return {"parser": parse, "autocompletion": complete, "metavar": f"{'|'.join(names)},..."}


def parse_device(value: str) -> str:
    """Give a device, or several with commas between them, in torch's words: `gpu` is cuda."""
    return re.sub(r"\bgpu\b", "cuda", value.strip().lower())


def complete_device(incomplete: str) -> list[str]:
    """Give the devices that a shell completes."""
    return [name for name in ("cpu", "cuda") if name.startswith(incomplete)]


ON_DEVICE: dict[str, Any] = {"parser": parse_device, "autocompletion": complete_device, "metavar": "DEVICE"}

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="The checkpoint: a folder or a hub name, NAME@REVISION for a revision, or demo for the small one in the "
        "package [default: the store's own, else QVSPLIT_MODEL, else Qwen/Qwen2-VL-2B-Instruct].",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
# Of the commands that ask, and of verify; extract has its own words for it
AskAdapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="ADAPTER",
        help="A PEFT adapter (LoRA) that is merged into the language model: a folder or a hub name, NAME@REVISION for "
        "a revision. What it has for the vision encoder is merged where files are encoded, and a store must have been "
        "made with it [default: the store's adapter, unless --model is given].",
        show_default=False,
        rich_help_panel=MODEL,
        hidden=True,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        **ON_DEVICE,
        help="cpu, cuda or cuda:N [default: cuda where there is one].",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
AskDevice = Annotated[
    str | None,
    typer.Option(
        **ON_DEVICE,
        help="cpu, cuda, cuda:N, or auto to spread the language model [default: cuda where there is one].",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
AnswerKernels = Annotated[
    str,
    typer.Option(
        "--kernels",
        **one_of("--kernels", *KERNELS),
        help="How answers are computed: fused, fast, or reference: transformers' own modules, one question at a time "
        "from its whole prompt, equal to the full model to the bit in every dtype if the store was made by extract "
        "--kernels reference, on the same kind of device, and stored as computed.",
        rich_help_panel=MODEL,
        hidden=True,
    ),
]
MaxImagePixels = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="An image of more pixels fails undecoded: in memory they take up to 16 bytes each.",
        rich_help_panel=PERFORMANCE,
        hidden=True,
    ),
]
ItemTimeout = Annotated[
    float,
    typer.Option(
        min=0.1,
        metavar="SECONDS",
        help="A file that takes longer than this to read, or to decode, has failed.",
        rich_help_panel=PERFORMANCE,
        hidden=True,
    ),
]
# Of the commands that ask
AskEmbeds = Annotated[
    list[str] | None,
    typer.Option(
        "--embeds",
        "-e",
        metavar="STORE|SHARD",
        help="A folder, a shard or a glob; may be repeated [default: embeds].",
        show_default=False,
        rich_help_panel=INPUT,
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        help="A system message in place of the template's own.",
        show_default=False,
        rich_help_panel=MODEL,
        hidden=True,
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        help="The most tokens of an answer, reasoning included.",
        rich_help_panel=SAMPLING,
        hidden=True,
    ),
]
Thinking = Annotated[
    bool,
    typer.Option(
        "--thinking/--no-thinking",
        help="Ask a model that can to think before it answers: --json, --out and --report have its reasoning, "
        "plain output the answer alone. Choices are scored without.",
        rich_help_panel=SAMPLING,
        hidden=True,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Sample answers instead of the most probable tokens.",
        show_default=False,
        rich_help_panel=SAMPLING,
        hidden=True,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample from the most probable tokens of this probability.",
        show_default=False,
        rich_help_panel=SAMPLING,
        hidden=True,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help="Sample from this many of the most probable tokens.",
        show_default=False,
        rich_help_panel=SAMPLING,
        hidden=True,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="The same seed samples the same answers.",
        rich_help_panel=SAMPLING,
        hidden=True,
    ),
]
AskDtype = Annotated[
    str | None,
    typer.Option(
        **one_of("--dtype", *DTYPES, aliases=DTYPE_ALIASES),
        help="What to compute in [default: float32 on a CPU, the checkpoint's on CUDA].",
        show_default=False,
        rich_help_panel=MODEL,
        hidden=True,
    ),
]
UncheckedEncoder = Annotated[
    bool,
    typer.Option(
        "--unchecked-encoder",
        help="Ask although nothing shows that the features are from this model's vision encoder.",
        rich_help_panel=MODEL,
        hidden=True,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, one object a line.", rich_help_panel=OUTPUT)]
OutputFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        **one_of("--format", *FORMATS),
        help="text for people, tsv with 8 fixed columns, jsonl (as --json), paths of items one a line, or paths0 with "
        "a NUL after each [default: text on a terminal, else tsv].",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Absolute = Annotated[
    bool,
    typer.Option(
        "--absolute",
        help="Print absolute paths, in place of paths relative to the current folder.",
        rich_help_panel=OUTPUT,
        hidden=True,
    ),
]
Allow = Annotated[
    str | None,
    typer.Option(
        **some_of("--allow", "uncertain", "error"),
        help="Items with these verdicts do not trip --fail-on.",
        show_default=False,
        rich_help_panel=OUTPUT,
        hidden=True,
    ),
]
Wait = Annotated[
    bool,
    typer.Option("--wait", help="If another run is writing the store, wait for it.", rich_help_panel=INCREMENTAL),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only say what would be done; nothing is changed, and no other run is kept waiting.",
        rich_help_panel=INCREMENTAL,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only results, errors, failures and warnings.", rich_help_panel=OUTPUT),
]
ProgressMode = Annotated[
    str,
    typer.Option(
        **one_of("--progress", *PROGRESS_MODES),
        help="How to show on stderr how far it is: a bar, plain lines once a minute, json once a second, or none; auto "
        "is a bar on a terminal and plain lines elsewhere.",
        rich_help_panel=OUTPUT,
        hidden=True,
    ),
]
# For commands that read one store, and for those that write one: an argument, or the option of the same meaning
StoreArgument = Annotated[
    str | None,
    typer.Argument(metavar="STORE|SHARD", help="A folder, a shard or a glob [default: embeds].", show_default=False),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--embeds",
        "-e",
        metavar="STORE|SHARD",
        help="Another way to give the store.",
        show_default=False,
        rich_help_panel=INPUT,
    ),
]
FolderArgument = Annotated[
    str | None,
    typer.Argument(metavar="STORE", help="The store's folder [default: embeds].", show_default=False),
]
FolderOption = Annotated[
    str | None,
    typer.Option(
        "--embeds",
        "-e",
        metavar="STORE",
        help="Another way to give the store.",
        show_default=False,
        rich_help_panel=INPUT,
    ),
]


def as_format(name: str | None, *, as_json: bool) -> str | None:
    """Give the format that --format and --json name together; None where neither does."""
    if as_json and name not in (None, "jsonl"):
        raise UsageError(f"--json is --format jsonl, and --format {name} is given too; give one of them")
    return "jsonl" if as_json else name


def one_adapter(given: list[str] | None) -> str | None:
    """Give the adapter that was named, if one was. UsageError for several: the last one would stand for all."""
    if given is not None and len(given) > 1:
        raise UsageError("--adapter is given more than once; make one adapter of them with PEFT, and give that")
    return given[0] if given else None


def store_place(argument: str | None, option: str | None) -> str:
    """Give the store that was named, as an argument or by --embeds. UsageError if both name one."""
    if argument is not None and option is not None and argument != option:
        raise UsageError(f"two stores are given, {argument} and --embeds {option}; give one of them")
    return argument or option or DEFAULT_STORE


_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_duration(text: str, option: str) -> float:
    """Give `2h30m`, `90m`, `45s` or a number in seconds. UsageError, naming `option`, for other text."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise UsageError(f"{option} {text}: give a time such as 90m, 2h30m or 45s")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds

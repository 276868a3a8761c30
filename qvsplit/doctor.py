"""Find out what qvsplit runs on: versions, devices, decoders, the hub, a store. What a bug report should carry.

Nothing here raises for what it finds: a part that cannot be found out says why in `unknown`. Libraries are imported in
processes of their own, as a broken one may end the process that imports it. Users' names, tokens and the home folder's
path are in no part.
"""

from __future__ import annotations

import getpass
import json
import locale
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from qvsplit.checkpoints.files import INDEX_FILE, SINGLE_FILE
from qvsplit.checkpoints.hub import looks_like_hub_name
from qvsplit.checkpoints.opening import DEFAULT_MODEL
from qvsplit.checkpoints.ranges import kept_encoder
from qvsplit.errors import ConfigError, DiskError, ModelError, QvsplitError, StoreDamaged
from qvsplit.runtime.cpus import (
    THREAD_VARIABLES,
    WAIT_POLICY,
    affinity,
    cpu_quota,
    niceness,
    usable_cpus,
    wait_policy_is_ours,
)
from qvsplit.runtime.devices import has_bfloat16_units
from qvsplit.runtime.memory import machine_memory
from qvsplit.runtime.versions import installed_version, out_of_bounds

if TYPE_CHECKING:
    from qvsplit.store.storage import Storage, StoredFile

PACKAGES = (
    "qvsplit", "torch", "torchvision", "transformers", "tokenizers", "safetensors", "accelerate", "huggingface-hub",
    "numpy", "pyarrow", "pillow", "pillow-heif", "av", "qwen-vl-utils", "llguidance", "duckdb", "pandas", "polars",
    "typer", "rich", "peft", "compressed-tensors", "bitsandbytes", "optimum", "gptqmodel", "torchao",
)  # fmt: skip
NEEDED = ("torch", "transformers", "pyarrow.parquet", "PIL.Image", "av")  # without which nothing is encoded or asked
IMPORT_SECONDS, HUB_SECONDS = 120.0, 3.0
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
SPINNING_TIMES = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # by which GNU's and LLVM's OpenMP can be told exactly
SPIN, SLEEP = "they spin", "they sleep"
SLEEP_BY_US = f"{SLEEP}: qvsplit set {WAIT_POLICY}=passive, as it is niced"
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", WAIT_POLICY, *SPINNING_TIMES, "ONEDNN_MAX_CPU_ISA",
    "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "TRANSFORMERS_OFFLINE",
    "QVSPLIT_MODEL", "QVSPLIT_CACHE", "QVSPLIT_RANGES", "LANG", "LC_ALL", "TERM", "NO_COLOR",
)  # fmt: skip
VIDEO_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "prores")
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")
LOW_DISK = 1 << 30  # bytes: less than many shards take

# What each library says of itself, in its own process; `facts` is printed
_ASKED = {
    "torch": """
import torch
facts = {"default threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
         "cuda": torch.version.cuda, "onednn": torch.backends.mkldnn.is_available(), "devices": []}
if torch.cuda.is_available():
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        facts["devices"].append({"name": torch.cuda.get_device_name(number), "memory": total, "free": free,
                                 "bfloat16": torch.cuda.get_device_capability(number) >= (8, 0)})
""",
    "transformers": "from transformers import AutoConfig, AutoProcessor\nfacts = {}",
    "pyarrow.parquet": "import pyarrow.parquet\nfacts = {}",
    "PIL.Image": """
from PIL import Image, features
facts = {"JPEG": "jpg", "PNG": "zlib", "WebP": "webp", "AVIF": "avif", "JPEG 2000": "jpg_2000"}
facts = {name: bool(features.check(what)) for name, what in facts.items()}
try:
    import pillow_heif
    facts["HEIC"] = True
except Exception:
    facts["HEIC"] = False
""",
    "av": f"""
import av
facts = {{name: name in av.codecs_available for name in {VIDEO_CODECS!r}}}
facts["av1"] = facts["av1"] or "libdav1d" in av.codecs_available
""",
}  # fmt: skip


def examine(place: Path | None = None, model: str | None = None) -> dict[str, Any]:
    """Find out everything; `place` is a store's folder, `model` a hub name other than the default model's.

    Returns:
        The parts, in the order in which people read them. JSON-compatible.
    """
    model = model or os.environ.get("QVSPLIT_MODEL") or DEFAULT_MODEL
    with _Probes() as probes:
        asked = {name: _begun(_ask_library, name, probes) for name in NEEDED}
        hub = _begun(_hub, model)
        libraries = {name: future.result() for name, future in asked.items()}
        found = {
            "versions": _part(_versions),
            "bounds": _part(_bounds),
            "system": _part(_system),
            "cpu": _part(_cpu),
            "torch": libraries["torch"],
            "threads": _part(_threads, libraries["torch"]),
            "dtype": _part(_dtype_advice, libraries["torch"]),
            "images": libraries["PIL.Image"],
            "videos": libraries["av"],
            "imports": {name: facts.get("unknown", "ok") for name, facts in libraries.items()},
            "hub": hub.result(),
            "text": _part(_text),
            "environment": _environment(),
        }
    if place is not None:
        found |= {"disk": _part(_disk, place), "store": _part(_store, place)}
    shown: dict[str, Any] = without_names(found)
    return shown


def problems(found: Mapping[str, Any]) -> list[QvsplitError]:
    """Give what would stop an extraction or an answer, the gravest first, by what `examine` found."""
    wrong: list[QvsplitError] = [
        ModelError(f"{name} cannot be imported ({said}); install it again")
        for name, said in found["imports"].items()
        if said != "ok"
    ]
    store, disk = found.get("store", {}), found.get("disk", {})
    if "unknown" in store:
        kind = ConfigError if store.get("exit code") == ConfigError.exit_code else StoreDamaged
        wrong.append(kind(f"the store cannot be read: {store['unknown']}"))
    if store.get("damaged"):
        wrong.append(StoreDamaged(f"damage was found in {', '.join(store['damaged'])}; the next `extract` mends it"))
    if disk.get("writable") is False:
        wrong.append(DiskError(f"{disk['folder']} cannot be written"))
    return wrong


def lines(found: Mapping[str, Any]) -> list[str]:
    """Lay out what was found, a line a fact, for people and bug reports."""
    laid: list[str] = []
    for part, facts in found.items():
        for name, value in facts.items():
            laid += [f"{part:12}{name:18}{text}" for text in _values(value)]
    return laid


def _values(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [", ".join(f"{name} {one}" for name, one in value.items()) or "none"]
    if isinstance(value, list):
        return [text for one in value for text in _values(one)] or ["none"]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    return ["not installed" if value is None else str(value)]


def _part(find_out: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Give what a part finds out, or why it cannot: one part's failure is no other's."""
    try:
        return find_out(*given)
    except QvsplitError as error:
        return {"unknown": str(error), "exit code": error.exit_code}
    except Exception as error:
        return {"unknown": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}


def _begun(find_out: Callable[..., dict[str, Any]], *given: Any) -> Future[dict[str, Any]]:
    """Find out a part in a thread that nothing waits for at the end, as a pool's would be."""
    future: Future[dict[str, Any]] = Future()
    threading.Thread(target=lambda: future.set_result(_part(find_out, *given)), daemon=True).start()
    return future


# ------------------------------------------------------------------------------------------------------------- machine


def _versions() -> dict[str, Any]:
    return {"python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES}


def _bounds() -> dict[str, Any]:
    return {"out of bounds": [str(one) for one in out_of_bounds()]}


def _system() -> dict[str, Any]:
    release = {}
    with suppress(OSError):
        release = platform.freedesktop_os_release()
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "distribution": release.get("PRETTY_NAME", "unknown"),
        "memory": _size(machine_memory()),
    }


def _cpu() -> dict[str, Any]:
    names: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            names.setdefault(name.strip(), value.strip())
    flags = set(names.get("flags", names.get("Features", "")).split())
    quota = cpu_quota()
    return {
        "name": names.get("model name", platform.processor() or "unknown"),
        "features": ", ".join(flag for flag in CPU_FLAGS if flag in flags) or "none known",
        "cores": os.cpu_count(),
        "affinity": f"{affinity()} cores",
        "quota": "none" if quota is None else f"{quota:g} cores",
        "usable cores": usable_cpus(),
    }


def _threads(torch: Mapping[str, Any]) -> dict[str, Any]:
    """Say how many threads compute, how they stand with other processes, and what to do where that is bad."""
    most, niced, waiting = usable_cpus(), niceness(), _waiting()
    own = torch.get("default threads", most)  # that torch cannot be imported is said elsewhere
    chosen = [name for name in THREAD_VARIABLES if name in os.environ]
    advice = []
    if chosen and own > most:
        advice.append(
            f"torch has {own} threads by {' and '.join(chosen)}, and the quota allows {most}: all of them are stopped "
            f"together for part of the time; leave that out, or say {most}"
        )
    if niced > 0 and waiting == SPIN:
        advice.append(
            f"niced threads that spin are slowed down many times by a busy process: set {WAIT_POLICY}=passive, which "
            "qvsplit leaves to you as there are other variables of OpenMP's"
        )
    if niced == 0 and waiting == SLEEP:
        advice.append(
            f"{WAIT_POLICY}=passive slows small layers down and helps beside busy processes: else leave it out"
        )
    if niced > 0 and _is_on(AUTOGROUP):
        advice.append(
            "niceness counts among the processes of one session here, and of one service: to stand back for all others "
            "set kernel.sched_autogroup_enabled=0, or CPUWeight=idle of a systemd service"
        )
    return {
        "computing": own if chosen else min(own, most),
        "niceness": niced,
        "while waiting": waiting,
        "advice": advice or "nothing to do",
    }


def _waiting() -> str:
    """Say what OpenMP's threads do while they wait for each other, by the variables that say so."""
    exact = [f"{name}={os.environ[name]}" for name in SPINNING_TIMES if name in os.environ]
    if exact:
        return f"as {' and '.join(exact)} says"
    if wait_policy_is_ours():
        return SLEEP_BY_US
    return SLEEP if os.environ.get(WAIT_POLICY, "").strip().lower() == "passive" else SPIN


def _environment() -> dict[str, str]:
    """Give the variables that the user has set, and not qvsplit for itself."""
    ours = {WAIT_POLICY} if wait_policy_is_ours() else set()
    return {name: os.environ[name] for name in VARIABLES if name in os.environ and name not in ours}


def _is_on(setting: Path) -> bool:
    with suppress(OSError):
        return setting.read_text().strip() == "1"
    return False


def _dtype_advice(torch: Mapping[str, Any]) -> dict[str, Any]:
    if devices := torch.get("devices"):
        if all(device["bfloat16"] for device in devices):
            return {"advice": "the checkpoint's own, mostly bfloat16: the default on this GPU, and quickest there"}
        return {"advice": "`dtype=float16`: this GPU multiplies float16 in hardware, and bfloat16 only slowly"}
    if has_bfloat16_units():
        return {
            "advice": "float32, the default, gives the full model's answers token for token; `dtype=bfloat16` is "
            "quicker for a large model, as this CPU multiplies it in hardware, and rounds"
        }  # fmt: skip
    return {"advice": "float32, the default: without units for it this CPU computes bfloat16 several times slower"}


def _text() -> dict[str, Any]:
    return {
        "locale": ".".join(part or "none" for part in locale.getlocale()),
        "file names": sys.getfilesystemencoding(),
        "stdout": f"{sys.stdout.encoding}, {'a terminal' if sys.stdout.isatty() else 'no terminal'}",
    }


# ----------------------------------------------------------------------------------------------------------- libraries


class _Probes:
    """Processes that import libraries: none of them outlives the block, whatever ends it."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False
        self._lock = threading.Lock()

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run Python code in a process of its own. TimeoutExpired where that takes too long."""
        with self._lock:
            if self._ended:
                raise RuntimeError("nobody waits for it any more")
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, errors="replace",
            )  # fmt: skip
            self._running.add(process)
        try:
            out, said = process.communicate(timeout=IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        finally:
            with self._lock:
                self._running.discard(process)
        return subprocess.CompletedProcess(process.args, process.returncode, out, said)

    def __enter__(self) -> _Probes:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            running = list(self._running)
        for process in running:
            process.kill()
        for process in running:
            with suppress(subprocess.TimeoutExpired):  # where the system itself hangs in it
                process.wait(1)


def _ask_library(name: str, probes: _Probes) -> dict[str, Any]:
    """Import a library in a process of its own, and have it say what it can do."""
    code = f"{_ASKED[name]}\nimport json\nprint('\\n' + json.dumps(facts))"
    try:
        done = probes.run(code)
    except subprocess.TimeoutExpired:
        return {"unknown": f"importing it took more than {IMPORT_SECONDS:g} s"}
    if done.returncode < 0:
        return {"unknown": f"importing it ended the process by {signal.Signals(-done.returncode).name}"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"unknown": said[-1][:300] if said else f"importing it ended the process with {done.returncode}"}
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "devices" in facts:
        facts["devices"] = [
            device | {"memory": _size(device["memory"]), "free": _size(device["free"])} for device in facts["devices"]
        ]
    return facts


# ----------------------------------------------------------------------------------------------------------------- hub


def _hub(model: str) -> dict[str, Any]:
    from huggingface_hub import constants

    found: dict[str, Any] = {"model": model, "endpoint": _without_credentials(constants.ENDPOINT)}
    found["offline"] = bool(constants.HF_HUB_OFFLINE)
    found["reachable"] = "not tried: offline" if found["offline"] else _reached(constants.ENDPOINT)
    found["cache"] = constants.HF_HUB_CACHE
    found["cached"] = _cached(model) if looks_like_hub_name(model) else "a folder, not from the hub"
    return found


def _reached(endpoint: str) -> str:
    """Say whether anything answers there. Sends no token. A name may take longer to look up than anybody waits."""
    said = ["no (no answer in time)"]

    def ask() -> None:
        said[0] = _answer(endpoint)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * HUB_SECONDS)
    return said[0]


def _answer(endpoint: str) -> str:
    try:
        asked = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "qvsplit-doctor"})
        with urllib.request.urlopen(asked, timeout=HUB_SECONDS):
            return "yes"
    except urllib.error.HTTPError:  # whoever answers so is there
        return "yes"
    except (OSError, ValueError) as error:
        return f"no ({getattr(error, 'reason', None) or error})"


def _cached(model: str) -> str:
    """Say which of a model's files lie in the caches: the small ones, how many with weights, the encoder alone."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = model.partition("@")

    def cached(file_name: str) -> str | None:
        path = try_to_load_from_cache(name, file_name, revision=revision or None)
        return path if isinstance(path, str) else None

    config = cached("config.json")
    if config is None:
        return "nothing"
    small = Path(config).parent
    alone = ", and the vision encoder alone" if kept_encoder(name, small.name, small=small) else ""
    index = cached(INDEX_FILE)
    if index is None:
        return ("settings and weights" if cached(SINGLE_FILE) else "settings, no weights") + alone
    files = set(json.loads(Path(index).read_text())["weight_map"].values())
    return f"settings and {sum(cached(file) is not None for file in files)} of {len(files)} files of weights{alone}"


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


# --------------------------------------------------------------------------------------------------------------- store


def _disk(place: Path) -> dict[str, Any]:
    folder = next(one for one in (place.absolute(), *place.absolute().parents) if one.is_dir())
    usage = shutil.disk_usage(folder)
    found = {"folder": str(folder), "free": _size(usage.free), "writable": os.access(folder, os.W_OK)}
    return found | ({"note": "little is free"} if usage.free < LOW_DISK else {})


def _store(place: Path) -> dict[str, Any]:
    """Say how a store is, as far as that is known without reading its features."""
    from qvsplit.store import layout
    from qvsplit.store.opening import open_store
    from qvsplit.store.repair import damage_marks
    from qvsplit.store.schema import FORMAT_VERSION
    from qvsplit.store.storage import LocalStorage

    storage = LocalStorage(place)
    numbered = ((layout.shard_number(file.name), file) for file in storage.list())
    files = [(number, file) for number, file in numbered if number is not None]
    if not files:
        return {"folder": str(place), "shards": "none yet"}
    catalogue = _catalogue_state(storage, files)  # opening the store may mend it
    with open_store(place) as opened:
        counts = opened.catalogue.item_counts()
        config, made_by = opened.config, opened.provenance
        found: dict[str, Any] = {
            "folder": str(place),
            "format": FORMAT_VERSION,
            "shards": f"{len(files)}, {_size(sum(file.size for _, file in files))}",
            "catalogue": catalogue,
            "items": {f"{kind}s {status}": items for (status, kind), (items, _) in sorted(counts.items())},
            "failed": _failures(row.error for row in opened.rows_with_status("failed")),
            "damaged": sorted(damage_marks(storage)),
            "quarantined": len(storage.list(layout.QUARANTINE)),
        }
        if config is not None and made_by is not None:
            found |= {"model": made_by.model, "made on": made_by.device, "config": json.dumps(config.to_json())}
            found["made with"] = dict(made_by.versions)
        return found


def _catalogue_state(storage: Storage, files: list[tuple[int, StoredFile]]) -> str:
    from qvsplit.store.catalogue_file import known_catalogue, read_published

    if (known := known_catalogue(storage, files)) is not None:
        known.close()
        return "up to date"
    if (published := read_published(storage)) is not None:
        published.close()
        return "not that of these shards; it is brought up to date when the store is opened"
    return "none, or not readable; it is made when the store is opened"


def _failures(errors: Iterable[str | None]) -> dict[str, int]:
    """Count failures by their words, without what is particular to one file."""
    counted: dict[str, int] = {}
    for error in errors:
        words = re.sub(r"\S*[/.]\S*\.\w+|\d+", "…", error or "unknown")
        counted[words[:100]] = counted.get(words[:100], 0) + 1
    return dict(sorted(counted.items(), key=lambda one: -one[1])[:5])


# --------------------------------------------------------------------------------------------------------------- words


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def without_names(value: Any) -> Any:
    """Give the value with the home folder as ~ and the user's name left out of every path."""
    if isinstance(value, Mapping):
        return {name: without_names(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_names(one) for one in value]
    return _without_name(value) if isinstance(value, str) else value


def _without_name(text: str) -> str:
    text = re.sub(r"(\w+://)[^/@\s]+@", r"\1", text)  # credentials in an address
    text = re.sub(r"\bhf_\w+", "hf_…", text)
    homes = {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))} - {"/", "~"}
    for home in sorted(homes, key=len, reverse=True):
        text = re.sub(rf"{re.escape(home)}(?=/|\W|$)", "~", text)
    with suppress(OSError, KeyError, ImportError):
        text = re.sub(rf"(?<=/){re.escape(getpass.getuser())}(?=/|\W|$)", "USER", text)
    return text

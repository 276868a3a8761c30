"""The arrows between the rooms: who may know whom, and who may touch torch."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import qvsplit

PACKAGE = Path(qvsplit.__file__).parent
# Each room and the rooms it may know: what stands before it on the data's way.
ARROWS = {
    "errors": set(),
    "families": set(),
    "interrupts": {"errors"},
    "recipe": {"errors"},
    "devices": {"errors", "recipe"},
    "checkpoint": {"errors", "families"},
    "hf": {"errors", "checkpoint", "devices"},
    "weights": {"errors", "families", "checkpoint", "hf"},
    "folders": {"errors"},
    "images": {"errors", "folders"},
    "decoder": {"errors", "folders", "images", "devices"},
    "packing": set(),
    "tower": {"packing"},
    "vision": {"errors", "families", "checkpoint", "devices", "recipe", "hf", "weights", "tower"},
    "pages": set(),
    "store": {"errors", "recipe", "pages"},
    "index": {"recipe", "folders", "store"},
    "rows": {"errors", "recipe", "store"},
    "runs": set(),
    "lock": {"errors", "store"},
    "album": {"errors", "recipe", "folders", "store", "index", "rows"},
    "rebuild": {"folders", "store", "lock", "album"},
    "compact": {"errors", "recipe", "folders", "store", "index", "rows", "lock", "album", "rebuild"},
    "preview": {"errors", "families", "checkpoint", "devices", "recipe", "folders", "decoder", "runs", "album"},
    "prompt": {"errors", "checkpoint", "hf"},
    "prefix": set(),
    "language": {"errors", "recipe", "checkpoint", "devices", "store", "prompt", "weights", "packing", "prefix"},
    "checks": {"errors"},
    "schema": {"errors"},
    "answers": {"errors", "interrupts", "store"},
    "report": {"errors", "checks", "folders", "images", "store"},
}
LOOPS = {"extract", "ask", "verify"}
# a room of several files above the loops, with the embedded checkpoint; it calls them as a user would
DEMO = {"demo/__init__": {"errors", "interrupts", "checkpoint", "folders", "store", "album", "checks", "extract", "ask"},
        "demo/table": {"errors", "checkpoint", "images", "demo"}}  # fmt: skip
DOORS = {"cli", "__init__", "__main__"}
TOUCH_TORCH = {"hf", "weights", "vision", "tower", "language", "packing", "prefix", "schema", "devices", *LOOPS}


def imports(room: str, *, for_types: bool = False) -> set[str]:
    """Modules that a room imports, anywhere in it; those for type checking only are another matter."""
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    if not for_types:
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
        for check in checks:
            check.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{alias.name}" if node.module == "qvsplit" else node.module for alias in node.names
            }
    return found


def rooms_known(room: str) -> set[str]:
    return {name.split(".")[1] for name in imports(room) if name.startswith("qvsplit.")}


def test_every_room_is_on_the_plan():
    rooms = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}
    assert rooms == ARROWS.keys() | LOOPS | DOORS | DEMO.keys()


@pytest.mark.parametrize("room", [*ARROWS, *DEMO])
def test_a_room_knows_only_what_stands_before_it(room):
    assert rooms_known(room) <= (ARROWS | DEMO)[room]


def test_vision_and_language_never_meet():
    assert "language" not in rooms_known("vision")
    assert "vision" not in rooms_known("language")


def test_nobody_knows_the_doors():
    for room in ARROWS.keys() | LOOPS | DEMO.keys():
        assert not rooms_known(room) & (DOORS - {"__init__"})
        assert "demo" not in rooms_known(room) or room in DEMO


def test_only_some_rooms_touch_torch():
    for room in ARROWS.keys() | LOOPS | DOORS | DEMO.keys():
        torch = {
            name
            for name in imports(room)
            if name.split(".")[0] in {"torch", "torchvision", "transformers", "accelerate"}
        }
        assert not torch or room in TOUCH_TORCH, (room, torch)


def test_nothing_can_run_code_from_a_file():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "trust_remote_code=True" not in text
        assert "torch.load" not in text
        assert not {"pickle", "cloudpickle", "joblib", "dill"} & {
            name.split(".")[0] for name in imports(path.relative_to(PACKAGE).with_suffix("").as_posix())
        }


def test_the_public_names_are_there_and_typed():
    assert sorted(qvsplit.__all__) == list(qvsplit.__all__) == sorted(qvsplit._HOMES)
    for name in qvsplit.__all__:
        thing = getattr(qvsplit, name)
        assert thing is getattr(importlib.import_module(f"qvsplit.{qvsplit._HOMES[name][0]}"), qvsplit._HOMES[name][1])
        assert thing.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qvsplit.nonsense
    assert (PACKAGE / "py.typed").exists()


def test_exit_codes_are_distinct():
    from qvsplit import errors

    kinds = [
        errors.UsageError,
        errors.ModelError,
        errors.RecipeError,
        errors.AlbumInUse,
        errors.AlbumDamaged,
        errors.DiskError,
    ]
    assert [kind.exit_code for kind in kinds] == [2, 3, 4, 5, 6, 7]
    assert not issubclass(errors.PictureError, errors.QvsplitError)

"""What holds for the whole package. Who may import whom is held by import-linter (`make check`)."""

from __future__ import annotations

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import qvsplit
from qvsplit import errors

PACKAGE = Path(qvsplit.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_nothing_can_run_code_from_a_file():
    for path in MODULES:
        text = path.read_text()
        assert "trust_remote_code=True" not in text, path
        assert "torch.load" not in text, path
        if path.name == "packing.py":  # what the processes of one run on a cluster send each other, and no file
            assert "pickle.load(" not in text and "open(" not in text
            continue
        assert not {"pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve"} & {
            name.split(".")[0] for name in imports(path)
        }, path


def test_every_module_says_what_it_is_for():
    assert [path for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_the_contracts_of_the_layers_hold():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True, text=True, check=False, cwd=PACKAGE.parent, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_public_names_are_there_and_documented():
    assert sorted(qvsplit.__all__) == list(qvsplit.__all__) == sorted(qvsplit._MODULES)
    for name in qvsplit.__all__:
        public = getattr(qvsplit, name)
        assert public is getattr(importlib.import_module(f"qvsplit.{qvsplit._MODULES[name]}"), name)
        assert public.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qvsplit.nonsense
    assert (PACKAGE / "py.typed").exists()


def test_modules_are_not_hidden_by_the_functions_they_hold():
    assert qvsplit.__dict__.get("extract") is None or qvsplit.extract.__name__ == "qvsplit.extract"


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, qvsplit; print(sorted({'torch', 'numpy', 'pyarrow', 'PIL', 'typer', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exit_codes_are_distinct():
    kinds = [
        errors.UsageError,
        errors.ModelError,
        errors.ConfigError,
        errors.StoreInUse,
        errors.StoreDamaged,
        errors.DiskError,
    ]
    assert [kind.exit_code for kind in kinds] == [2, 3, 4, 5, 6, 7]
    assert not issubclass(errors.ItemError, errors.QvsplitError)


@pytest.mark.parametrize(
    "error",
    [
        errors.UsageError("no such file"),
        errors.WeightsError("here", missing=["a"], unexpected=["b"], misshapen={"c": "[1] instead of [2]"}),
        errors.ShardDamaged("it is damaged", "shard-000001.parquet", "its footer"),
        errors.OutOfMemory("too long"),
        errors.ItemError("took too long", "timeout"),
        errors.ItemNotFound("no longer exists"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_an_item_error_is_of_a_known_kind():
    with pytest.raises(ValueError, match="no kind of error"):
        errors.ItemError("odd", "weather")

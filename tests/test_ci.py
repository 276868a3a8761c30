"""`.ci/run` and the browser that it installs, with fakes of everything that would change the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import browser

ROOT = Path(__file__).parent.parent
TOOLS = ("bash", "cat", "chmod", "cksum", "cut", "dirname", "du", "env", "find", "grep", "mkdir", "mktemp", "rm", "sleep",
         "tail", "timeout", "true")  # fmt: skip
INSTALLS = 'case "$*" in *install*) echo > "$BIN/chromium"; chmod +x "$BIN/chromium";; esac'
AT_THE_SECOND_TRY = (
    f'[ -e "$BIN/tried" ] || {{ case "$*" in *install*) echo > "$BIN/tried";; esac; exit 100; }}; {INSTALLS}'
)
FAILS = 'echo "E: Unable to locate package chromium" >&2; exit 100'
PASSES_ON = '[ "$1" = -n ] && shift && exec "$@"'


class Machine:
    """A PATH with the tools that the scripts need, and fakes. `calls` has what was called, and with what."""

    def __init__(self, folder: Path, **fakes: str) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name) or name)
        make = 'for word in "$@"; do case $word in VENV=*) mkdir -p "${word#VENV=}";; esac; done'
        required = 'echo "require=${QVSPLIT_REQUIRE_BROWSER-} no=${QVSPLIT_NO_BROWSER-}" >> "$BIN/../calls"'
        for name, body in ({"id": "echo 0", "dpkg": "", "make": f"{make}; {required}"} | fakes).items():
            said = f'echo "{name} $* ${{DEBIAN_FRONTEND-}}" >> "$BIN/../calls"'
            (self.bin / name.replace("_", "-")).write_text(f"#!{self.bin}/bash\n{said}\n{body}\n")
            (self.bin / name.replace("_", "-")).chmod(0o755)

    def run(self, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "BIN": str(self.bin), "QVSPLIT_CI_CACHE": str(self.folder / "cache"),
                       "TMPDIR": str(self.folder)}  # fmt: skip
        return subprocess.run(
            ["bash", ROOT / ".ci" / script, *words], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )  # fmt: skip

    @property
    def calls(self) -> list[str]:
        return [line.strip() for line in (self.folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("fakes", [
    {"chromium": ""}, {"google_chrome": "", "id": "echo 1000"}, {"apt_get": INSTALLS}, {"apt_get": AT_THE_SECOND_TRY},
    {"apt_get": INSTALLS, "id": "echo 1000", "sudo": PASSES_ON},
], ids=["there", "another one", "installed", "at the second try", "by sudo"])  # fmt: skip
def test_with_a_browser_no_test_may_be_skipped_for_want_of_one(tmp_path, fakes):
    machine = Machine(tmp_path, **fakes)
    done = machine.run("run")
    assert done.returncode == 0 and "NOT TESTED" not in done.stdout and done.stderr == ""
    assert machine.calls[-1] == "require=1 no="
    asked = [call for call in machine.calls if call.startswith("apt_get")]
    assert bool(asked) is ("apt_get" in fakes)
    assert sum(call.startswith("sudo -n timeout") for call in machine.calls) == (len(asked) if "sudo" in fakes else 0)
    for update, install in zip(asked[::2], asked[1::2], strict=True):
        assert "update" in update and install.endswith("install -y --no-install-recommends chromium noninteractive")


@pytest.mark.parametrize(("fakes", "reason"), [
    ({}, "no apt-get"), ({"apt_get": INSTALLS, "id": "echo 1000"}, "only root"),
    ({"apt_get": INSTALLS, "id": "echo 1000", "sudo": "exit 1"}, "only root"),
    ({"apt_get": FAILS}, "(E: Unable to locate package chromium)"), ({"apt_get": ""}, "gave no reason"),
], ids=["no apt-get", "no root", "no sudo", "fails", "installs nothing"])  # fmt: skip
def test_without_one_the_run_says_so_in_a_line_and_goes_on(tmp_path, fakes, reason):
    machine = Machine(tmp_path, **fakes)
    done = machine.run("run")
    assert done.returncode == 0 and done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if "NOT TESTED IN A BROWSER" in line]
    assert reason in line
    assert machine.calls[-1] == f"require= no={line.split('BROWSER: ')[1]}"
    assert not (tmp_path / "bin" / "chromium").exists()


def test_what_hangs_is_ended(tmp_path):
    machine = Machine(tmp_path, apt_get="exec sleep 600")
    done = machine.run("install-browser", "0.2")
    assert done.returncode == 1 and done.stdout.count("\n") == 1 and "within 0.2 s" in done.stdout
    assert sum("install" in call for call in machine.calls) == 2  # tried again


def test_tests_without_a_browser_are_skipped_and_fail_where_there_has_to_be_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("QVSPLIT_REQUIRE_BROWSER", "QVSPLIT_NO_BROWSER"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(pytest.skip.Exception, match="there is no browser.*chromium"):
        browser.required()
    monkeypatch.setenv("QVSPLIT_NO_BROWSER", "only root can")
    with pytest.raises(pytest.skip.Exception, match="only root can"):
        browser.required()
    monkeypatch.setenv("QVSPLIT_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="only root can.*QVSPLIT_REQUIRE_BROWSER"):
        browser.required()
    (tmp_path / "chromium").write_text("")
    os.chmod(tmp_path / "chromium", 0o755)
    assert browser.required() == str(tmp_path / "chromium")

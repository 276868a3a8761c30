"""What contributors and those who report something are given: forms, hooks, and pages that name files and tests."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
import yaml

from qvsplit.sources import decoder, decoder_process, files, images, videos

ROOT = Path(__file__).parent.parent
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
SECURITY = (ROOT / "SECURITY.md").read_text()
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")]
PAGES += [ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md"]

# docs.github.com, "Syntax for GitHub's form schema": the attributes that each kind of field must and may have
FIELDS = {
    "markdown": ({"value"}, set()),
    "textarea": ({"label"}, {"description", "placeholder", "value", "render"}),
    "input": ({"label"}, {"description", "placeholder", "value"}),
    "dropdown": ({"label", "options"}, {"description", "multiple", "default"}),
    "checkboxes": ({"label", "options"}, {"description"}),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_has_what_githubs_schema_asks_for(form):
    content = yaml.safe_load(form.read_text())
    assert content.keys() <= {"name", "description", "title", "labels", "body", "assignees", "projects", "type"}
    assert all(isinstance(content[key], str) and content[key] for key in ("name", "description", "title"))
    for field in content["body"]:
        must, may = FIELDS[field["type"]]
        assert must <= field["attributes"].keys() <= must | may, field
        assert field.keys() <= {"type", "id", "attributes", "validations"}, field
        assert all(type(value) is bool for value in field.get("validations", {"": True}).values())
        for option in field["attributes"].get("options", []):
            assert isinstance(option, str) or option.keys() <= {"label", "required"}, field
    asked = [field for field in content["body"] if field["type"] != "markdown"]
    ids, labels = ([take(field) for field in asked] for take in (lambda f: f["id"], lambda f: f["attributes"]["label"]))
    assert asked and len(set(ids)) == len(ids) and len(set(labels)) == len(labels)
    assert all(re.fullmatch(r"[\w-]+", one) for one in ids)


def test_there_is_a_form_for_every_kind_of_report():
    assert {form.stem for form in FORMS} == {"bug", "wrong-answer", "model-family", "feature"}
    names = [yaml.safe_load(form.read_text())["name"] for form in FORMS]
    assert len(set(names)) == len(names)
    config = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml").read_text())
    assert config.keys() <= {"blank_issues_enabled", "contact_links"} and type(config["blank_issues_enabled"]) is bool


def test_the_hooks_are_the_commands_of_make_check():
    recipe = (ROOT / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0].splitlines()[1:]
    commands = [line.strip().replace("$(VENV)", ".venv") for line in recipe]
    assert len(commands) > 3
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    assert [hook["entry"] for hook in local["hooks"]] == commands
    for hook in local["hooks"]:
        assert hook.keys() >= {"id", "name"} and hook["language"] == "system" and hook["pass_filenames"] is False


def test_the_workflow_runs_what_a_clean_checkout_is_tested_by():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML 1.1 takes `on` for true
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@functools.cache
def functions_of(file: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_test_that_a_page_names_exists(page):
    words = {word for code in re.findall(r"`([^`\n]+)`", page.read_text()) for word in code.split()}
    for word in words:
        file, _, test = word.partition("::")
        if test and "…" not in word:
            assert test in functions_of(file), word
        elif re.fullmatch(r"[\w./-]+/[\w.-]+\.(py|toml|md|yml)|(bench|docs|qvsplit|tests|tools)/[\w./-]*", file):
            assert (ROOT / file).exists(), word


def test_every_promise_names_a_test_that_holds_it():
    promised = SECURITY.split("\n## What is promised\n")[1].split("\n## ")[0]
    promises = re.split(r"\n- ", promised.replace("\n### ", "\n- ### "))
    promises = [one for one in promises if one.strip() and not re.match(r"###? [^\n]*\s*$", one)]
    assert len(promises) > 20
    assert [one for one in promises if "`tests/" not in one] == []


def test_the_limits_are_those_of_the_code():
    for limit in (
        f"{decoder.ITEM_SECONDS:g} seconds", f"{decoder_process.MEMORY_BYTES >> 30} GiB a child",
        f"at most {files.MAX_FILE_BYTES >> 30} GiB", f"({images.MAX_IMAGE_PIXELS:,}, unless",
        f"{videos.MAX_PIXELS:,} pixels each", f"{videos.MAX_DECODED_PIXELS:,} of all", f"{videos.MAX_PACKETS:,} frames",
        f"{videos.MAX_SECONDS // 86400} days",
    ):  # fmt: skip
        assert limit in " ".join(SECURITY.split()), limit

"""Checkpoints made by a hostile hand: nothing in one of them is run."""

from __future__ import annotations

import json
import shutil

import pytest

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.opening import DEMO_FOLDER, open_checkpoint
from qvsplit.errors import ModelError
from qvsplit.models.prompt import Placeholder, Prompter


@pytest.fixture
def demo(tmp_path):
    """The demo's checkpoint, to be spoilt."""
    return shutil.copytree(DEMO_FOLDER, tmp_path / "demo")


def test_code_that_a_checkpoint_brings_is_never_run(demo):
    mark = demo / "ran"
    (demo / "hostile.py").write_text(f"open({str(mark)!r}, 'w')\nclass Any: pass\n")
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor"), "hostile.Any")
    auto_map = classes | {"AutoTokenizer": ["hostile.Any", "hostile.Any"]}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        content = json.loads((demo / name).read_text())
        (demo / name).write_text(json.dumps(content | {"auto_map": auto_map}))
    checkpoint = open_checkpoint(demo, "language")
    hf.load_config(checkpoint)
    hf.load_processor(checkpoint)
    assert not mark.exists()


@pytest.mark.parametrize("reach", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
    "{{ messages.append.__self__.__class__.__base__ }}",
])  # fmt: skip
def test_a_chat_template_reaches_nothing_of_python(demo, reach):
    template, mark = demo / "chat_template.jinja", demo / "ran"
    template.write_text(reach.replace("MARK", str(mark)) + template.read_text())
    prompter = Prompter(open_checkpoint(demo, "language"))
    with pytest.raises(ModelError, match="no usable chat template .*unsafe"):
        prompter.ask("What is it?", [Placeholder(((prompter._image_token, 1),), 1)])
    assert not mark.exists()

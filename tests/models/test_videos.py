"""Questions about clips, alone and beside others: the processor's own prompts, and the full model's own answers."""

from __future__ import annotations

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qvsplit.answering.requests import PromptItems
from qvsplit.checkpoints import hf
from qvsplit.checkpoints.model_class import encoders_alone, full_class
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ModelError, StoreDamaged, UsageError
from qvsplit.models import processor_proof, prompt, ways
from qvsplit.models.language import LanguageModel
from tests.support.every_model import further
from tests.support.families.reference import noise_clip
from tests.support.families.split import NO_THINKING, Split
from tests.support.language_models import noise

QUESTIONS = ["What happens?", "Which colour is seen first, and which one last?", "Count."]
STILL = noise_clip(7, 6)
STILL.frames[1:] = STILL.frames[:1]
ITEMS = {
    "still": STILL,
    "short": noise_clip(1),
    "other": noise_clip(2, 6, 128, 64, every=5),
    "odd": noise_clip(3, 5, 64, 64),
    "long": noise_clip(4, 40, 64, 96),  # more frames than rows and columns: the next position is not the largest + 1
    "image": noise(5),
    "photo": noise(6, 130, 90),
}
SHOWN = [
    ["short"], ["odd"], ["long"], ["short", "other"], ["long", "short", "long"], ["image", "short"],
    ["long", "image"], ["photo", "short", "image", "long"],
]  # fmt: skip


@pytest.fixture(scope="session")
def split(family_checkpoint, family_reference):
    return functools.cache(lambda name: Split(family_checkpoint(name), family_reference(name)))


def items_of(names):
    return [ITEMS[name] for name in names]


# --------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])  # of all: tests/models/test_matrix.py
def test_answers_about_clips_are_the_full_models(name, split):
    one, answers = split(name), []
    for number, shown in enumerate(SHOWN):
        items = items_of(shown)
        got = one.answers(items, QUESTIONS)
        answers.append(got)
        # every question behind the first and the last prefix, elsewhere one
        for place in range(len(QUESTIONS)) if number in (0, len(SHOWN) - 1) else (number % len(QUESTIONS),):
            assert got[place] == one.expected(items, QUESTIONS[place]), (shown, place)
    assert len({str(got) for got in answers}) > len(SHOWN) // 2  # what is shown matters


def test_a_long_clip_is_the_trap_that_it_is_meant_to_be(split):
    one = split("qwen2_vl")
    (question,) = one.asked(items_of(["long"]), QUESTIONS[:1])
    placed, _ = one.reference.model.model.get_rope_index(
        torch.tensor([question.prefix.input_ids]), torch.tensor([one.prompter.ask("?", [one.placeholder(ITEMS["long"])]).item_types[: len(question.prefix)]]),
        video_grid_thw=torch.tensor([one.placeholder(ITEMS["long"]).grid_thw]),
    )  # fmt: skip
    assert question.prefix.next_position < int(placed.max()) + 1


FURTHER = [
    "qwen4_exp", "qwen2_5_omni", "qwen3_omni_moe", "glm4v", "glm4v_moe", "glm46v", "glm_ocr", "llava_onevision",
    "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "lfm3_vl", "exaone4_5", "video_llama_3", "ernie4_5_vl_moe", "gemma4",
    "molmo2",
]  # fmt: skip
ONE_VIDEO_ONLY = {"llava_onevision", "molmo2"}
ONE_KIND_ONLY = {"glm4v", "glm4v_moe", "glm46v", "glm_ocr", "molmo2"}


@further
@pytest.mark.parametrize("name", FURTHER)
def test_other_families_that_take_videos(name, family_checkpoint, family_reference):
    one = Split(family_checkpoint(name), family_reference(name))
    for shown in (["short"], ["still"], ["long"], ["short", "other"], ["image", "short"], ["short", "image", "photo"]):
        items = items_of(shown)
        if (len(shown) > 1 and (name in ONE_KIND_ONLY if "image" in shown else name in ONE_VIDEO_ONLY)) or (
            name in ("llava_onevision",) and len(shown) > 2
        ):
            with pytest.raises(UsageError, match="ask about"):
                one.answers(items, QUESTIONS[:2])
        else:
            assert one.answers(items, QUESTIONS[:2]) == [one.expected(items, asked) for asked in QUESTIONS[:2]], shown


def with_way(one: Split, way: str, monkeypatch) -> LanguageModel:
    if way == ways.COPIED:
        decoder = one.language.model.config.get_text_config().model_type
        monkeypatch.setattr(ways, "DECODERS", {**ways.DECODERS, decoder: ways.COPIED})
    one.language.model.set_attn_implementation("sdpa")
    return LanguageModel(one.language.model, one.prompter, "none" if way == "whole" else "causal")


@pytest.mark.parametrize("way", ["copied", "whole"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_the_other_ways_give_the_same(name, way, family_checkpoint, family_reference, monkeypatch):
    one = Split(family_checkpoint(name), family_reference(name))  # its model is changed
    model = with_way(one, way, monkeypatch)
    assert model.way == {"copied": "copy its prefix", "whole": "whole prompt"}[way]
    for shown in (["long"], ["image", "short"]):
        items = items_of(shown)
        assert one.answers(items, QUESTIONS[:2], model) == [one.expected(items, asked) for asked in QUESTIONS[:2]]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_choices_about_clips_have_the_full_models_probabilities(name, split):
    one, choices = split(name), ["yes", "no", "a grey house"]
    tokens = [one.prompter.text_tokens(choice) for choice in choices]
    for shown in (["long"], ["image", "other"]):
        items = items_of(shown)
        (got,) = one.language.score(one.asked(items, QUESTIONS[:1]), [tokens])
        expected = [one.reference.logprob(items, QUESTIONS[0], mine, **NO_THINKING) for mine in tokens]
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "qwen3_5_moe"])
def test_what_the_decoder_is_given_is_what_the_full_model_gives_it(name, split):
    """Embeddings, positions, and of Qwen3-VL the deeper levels, of images and clips together."""
    one, items, seen = split(name), items_of(["photo", "other", "image", "odd"]), []

    def note(module, args, named):
        if named["inputs_embeds"].shape[1] > 1 and len(seen) < 2:
            seen.append(named)

    for full in (True, False):
        model = one.reference.model if full else one.language.model
        handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        try:
            one.expected(items, QUESTIONS[0]) if full else one.asked(items, QUESTIONS[:1])
        finally:
            handle.remove()
    theirs, ours = seen
    end = ours["inputs_embeds"].shape[1]
    assert torch.equal(ours["inputs_embeds"], theirs["inputs_embeds"][:, :end])
    assert torch.equal(ours["position_ids"], theirs["position_ids"][-3:, :, :end])
    levels = theirs.get("deepstack_visual_embeds")
    assert (levels is not None) == (name == "qwen3_vl")
    if levels is not None:
        assert torch.equal(ours["visual_pos_masks"], theirs["visual_pos_masks"][:, :end])
        assert len(levels) == len(ours["deepstack_visual_embeds"]) == 2
        for mine, level in zip(ours["deepstack_visual_embeds"], levels, strict=True):
            assert torch.equal(mine, level)


# ---------------------------------------------------------------------------------------------------- from rows on


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_sessions_answer_about_rows_of_clips(name, split):
    """One after the other, several together, and each compared with a clip that all prompts begin with."""
    one = split(name)
    session = one.session(ITEMS)
    row = {each.path: each for each in session.store}
    prompts = [
        PromptItems((row["short"],)),
        PromptItems((row["short"], row["image"], row["long"])),
        *(PromptItems((row["long"], row[other]), shared=1) for other in ("short", "photo", "other")),
        *(PromptItems((row["image"], row[other]), shared=1) for other in ("short", "photo")),
    ]
    extended = []
    prefill = LanguageModel.prefill

    def noted(self, prompt, features, *, after=None):
        extended.append(after is not None)
        return prefill(self, prompt, features, after=after)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "prefill", noted)
        answers = list(session.survey(prompts, QUESTIONS[:2]))
    assert len(answers) == 2 * len(prompts)
    assert sum(extended) == 5  # all that are compared
    for answer in answers:
        shown = [each.path for each in answer.rows]
        assert answer.error is None
        assert answer.tokens == one.expected(items_of(shown), answer.question), (shown, answer.question)


@pytest.mark.parametrize("way", [None, "whole"])
def test_a_wrong_row_is_its_own_error(way, split, family_checkpoint, family_reference, monkeypatch):
    one = split("qwen3_vl")
    if way is not None:
        one = own("qwen3_vl", family_checkpoint, family_reference)
        one.__dict__["language"] = with_way(one, way, monkeypatch)
    session = one.session(ITEMS)
    good, wrong = session.store.rows[0], session.store.rows[1]
    t, h, w = wrong.grid_thw
    session.store.rows[1] = replace(wrong, grid_thw=(t * h // 2, 2, w))
    answers = {
        answer.rows[0].path: answer
        for answer in session.survey([PromptItems((each,)) for each in session.store.rows[:2]], QUESTIONS[:1])
    }
    assert answers[good.path].tokens == one.expected(items_of([good.path]), QUESTIONS[0])
    assert "placeholder and grid do not belong together" in answers[wrong.path].error
    assert "\n" not in answers[wrong.path].error


# ----------------------------------------------------------------------------------------------------- what proves


@pytest.fixture
def proved(monkeypatch) -> list[tuple[int, int]]:
    """The kinds of prompts that were proved, by how many images and videos they show."""
    proofs: list[tuple[int, int]] = []
    prove = processor_proof.prove

    def noted(maker, images, videos):
        proofs.append((images, videos))
        return prove(maker, images, videos)

    monkeypatch.setattr(prompt, "prove", noted)
    return proofs


def test_each_kind_of_prompt_is_proved_once_before_its_first_use(split, family_checkpoint, family_reference, proved):
    one = Split(family_checkpoint("qwen2_5_vl"), family_reference("qwen2_5_vl"))
    for shown in [*SHOWN, *SHOWN, ["image"], ["image", "photo"]]:
        one.prompter.ask("?", [one.placeholder(ITEMS[name]) for name in shown])
    assert proved == [(0, 1), (0, 2), (1, 1), (2, 2), (1, 0), (2, 0)]


@pytest.mark.parametrize("counts", [(0, 1), (0, 2), (1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_proof_is_of_every_order_that_matters(counts, split, monkeypatch):
    maker, calls = split("qwen2_5_vl").prompter, []
    call = processor_proof._call

    def noted(processor, items, question):
        calls.append("".join(processor_proof.kind_of(item)[0] for item in items))
        return call(processor, items, question)

    monkeypatch.setattr(processor_proof, "_call", noted)
    proof = processor_proof.prove(maker, *counts)
    assert calls == {
        (0, 1): ["v", "v"], (0, 2): ["vv"], (1, 1): ["iv", "vi"], (2, 1): ["ivi"], (1, 2): ["viv"],
        (2, 2): ["iviv", "vivi"],
    }[counts]  # fmt: skip
    assert proof.types == {"mm_token_type_ids": "items"}
    assert proof.inputs["video"] == {"second_per_grid_ts"}
    assert proof.inputs.get("image", frozenset()) == frozenset()


def own(name, family_checkpoint, family_reference) -> Split:
    return Split(family_checkpoint(name), family_reference(name))


def test_a_processor_that_shows_a_clip_otherwise_is_refused(family_checkpoint, family_reference, monkeypatch):
    """Alone, among others, or beside images: each refusal is of that alone."""
    one = own("qwen2_5_vl", family_checkpoint, family_reference)
    processor = one.prompter.processor
    clip, image = one.placeholder(ITEMS["short"]), one.placeholder(ITEMS["image"])
    replacing = type(processor).get_text_with_replacements
    calls = {"several": lambda images, videos: len(videos) > 1, "mixed": lambda images, videos: images and videos}

    def otherwise(when):
        def replaced(text, images=(), videos=(), audio=()):
            if when(images, videos) and videos[0].count(processor.video_token) > 1:  # the processor's own call
                videos = ["<" + video for video in videos]
            return replacing(processor, text, images, videos, audio)

        return replaced

    monkeypatch.setattr(processor, "get_text_with_replacements", otherwise(calls["several"]))
    with pytest.raises(UsageError, match="a video in another way .* ask about one video at a time"):
        one.prompter.ask("?", [clip, clip])
    assert one.prompter.ask("?", [clip]) and one.prompter.ask("?", [image, clip])

    one = own("qwen2_5_vl", family_checkpoint, family_reference)
    processor = one.prompter.processor
    monkeypatch.setattr(processor, "get_text_with_replacements", otherwise(calls["mixed"]))
    with pytest.raises(UsageError, match="where they stand side by side, .* ask about one at a time"):
        one.prompter.ask("?", [clip, image])
    assert one.prompter.ask("?", [clip, clip])

    one = own("qwen2_5_vl", family_checkpoint, family_reference)
    processor = one.prompter.processor
    monkeypatch.setattr(processor, "get_text_with_replacements", otherwise(lambda images, videos: videos))
    with pytest.raises(ModelError, match="cannot answer about videos: its processor's prompts cannot be made"):
        one.prompter.ask("?", [clip])
    assert one.prompter.ask("?", [image])


def test_small_inputs_that_others_change_are_refused(family_checkpoint, family_reference, monkeypatch):
    """As if seconds were counted over all clips of a prompt."""
    one = own("qwen2_5_vl", family_checkpoint, family_reference)
    processor, clip = one.prompter.processor, one.placeholder(ITEMS["short"])
    processing = type(processor)._process_videos

    def processed(videos, **options):
        given, texts = processing(processor, videos, **options)
        given["second_per_grid_ts"] = [one * len(texts) for one in given["second_per_grid_ts"]]
        return given, texts

    monkeypatch.setattr(processor, "_process_videos", processed)
    with pytest.raises(UsageError, match="ask about one video at a time"):
        one.prompter.ask("?", [clip, clip])
    assert one.prompter.ask("?", [clip])


@pytest.mark.parametrize(
    ("name", "read", "unread"),
    [
        ("qwen2_5_vl", {"video_grid_thw", "second_per_grid_ts"}, set()),
        ("molmo2", set(), {"image_token_pooling", "video_token_pooling"}),
        ("minicpmv4_6", set(), {"target_sizes_videos"}),
        ("minicpmv4_7", {"target_sizes_videos"}, set()),  # its positions are laid out by them
    ],
)
def test_what_the_encoder_alone_reads_may_be_otherwise_among_others(name, read, unread):
    names = encoders_alone(full_class(name, "here"))
    assert unread <= names and not read & names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llava", "LlavaForConditionalGeneration of transformers has no get_video_features"),
        ("internvl", "InternVLForConditionalGeneration of transformers has no get_video_features"),
    ],
)
def test_a_model_without_videos_says_so(name, said, split):
    one = split(name)
    clip = prompt.Placeholder((("<video>", 4),), 4, kind="video", name="a.mp4")
    for shown in ([clip], [clip, clip], [one.placeholder(ITEMS["image"]), clip]):
        with pytest.raises(ModelError, match=f"cannot answer about videos: {said}; ask about images") as refused:
            one.prompter.ask("?", shown)
        assert "\n" not in str(refused.value)
    assert one.prompter.ask("?", [one.placeholder(ITEMS["image"])])


def test_a_processor_without_videos_says_so(family_checkpoint, family_reference):
    one = own("qwen2_5_vl", family_checkpoint, family_reference)
    clip, image = one.placeholder(ITEMS["short"]), one.placeholder(ITEMS["image"])
    one = own("qwen2_5_vl", family_checkpoint, family_reference)
    one.prompter.processor.video_processor = None
    with pytest.raises(ModelError, match="cannot answer about videos: Qwen2_5_VLProcessor has no video processor"):
        one.prompter.ask("?", [clip])
    assert one.prompter.ask("?", [image])


def test_a_model_that_cannot_tell_frames_from_images_takes_one_kind_a_prompt(split):
    one = split("glm4v")
    clip, image = one.placeholder(ITEMS["short"]), one.placeholder(ITEMS["image"])
    for shown in ([clip, image], [image, clip]):
        with pytest.raises(UsageError, match="cannot tell videos from images in one prompt; ask about images or"):
            one.prompter.ask("?", shown)
    for names in (["short"], ["short", "other"], ["image", "photo"]):
        items = items_of(names)
        assert one.answers(items, QUESTIONS[:2]) == [one.expected(items, asked) for asked in QUESTIONS[:2]]


def test_a_template_that_puts_images_first_shares_no_beginning_that_is_a_clips(split):
    one = split("llava_onevision")
    session = one.session({name: ITEMS[name] for name in ("short", "image")})
    row = {each.path: each for each in session.store}
    for names in (["short", "image"], ["image", "short"]):
        items = PromptItems(tuple(row[name] for name in names), shared=1)
        for answer in session.survey([items], QUESTIONS[:2]):
            assert answer.error is None
            assert answer.tokens == one.expected(items_of(names), answer.question)


# ----------------------------------------------------------------------------------------------- what stores may say


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_a_foreign_stores_placeholder_of_a_clip_injects_nothing(name, split):
    one = split(name)
    whole = replace(one.placeholder(ITEMS["short"]), name="a.mp4")
    ((text, _),) = whole.runs
    tokenizer, processor = one.prompter.tokenizer, one.prompter.processor
    token = processor.image_token if name == "glm4v" else processor.video_token
    template = processor.chat_template
    control = [
        str(added) for added in tokenizer.added_tokens_decoder.values()
        if added.special or str(added) in template
    ]  # fmt: skip
    foreign = [added for added in control if added not in text and not added.isspace()]
    assert tokenizer.eos_token in foreign and (name == "glm4v" or processor.image_token in foreign)
    for added in foreign:
        for runs in (
            ((text, 1), (added, 1)),
            ((f"x{added}", 2), (text, 1)),
            ((text, 1), (added[:2], 1), (added[2:], 1)),
        ):
            with pytest.raises(StoreDamaged, match=r"a\.mp4 holds the control token .* stands for no video") as caught:
                one.prompter.ask("?", [replace(whole, runs=runs)])
            assert "\n" not in str(caught.value)
    for runs in (((text, 1), (token, 1)), ((token, 1 << 40),), (("text", 3),), ((text, 1), ("x", 1 << 40))):
        with pytest.raises(StoreDamaged, match=r"a\.mp4 does not have the [\d,]+ video tokens"):
            one.prompter.ask("?", [replace(whole, runs=runs)])
    assert one.prompter.ask("?", [whole])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_transformers_warns_of_nothing(name, family_checkpoint, caplog):
    """What it says of a processor's own call is of no use to users."""
    prompter = prompt.Prompter(open_checkpoint(family_checkpoint(name), "both"))
    clip = processor_proof.small_clips([(4, 64, 64)])[0]
    placeholder = prompter.placeholder_of(processor_proof.process(prompter.processor, clip, where="here")[1], "video")
    image = prompter.placeholder_of(hf.process_image(prompter.processor, noise(1))[1])
    prompter.ask("?", [placeholder, image, placeholder])
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_video_processor_in_a_file_of_its_own(name, family_checkpoint, family_reference, tmp_path):
    """As the hub has it."""
    folder = Path(shutil.copytree(family_checkpoint(name), tmp_path / name))
    whole = json.loads((folder / "processor_config.json").read_text())
    (folder / "video_preprocessor_config.json").write_text(json.dumps(whole.pop("video_processor")))
    (folder / "preprocessor_config.json").write_text(json.dumps(whole.pop("image_processor")))
    (folder / "processor_config.json").unlink()
    other, one = Split(folder, family_reference(name)), Split(family_checkpoint(name), family_reference(name))
    assert other.placeholder(ITEMS["short"]) == one.placeholder(ITEMS["short"])
    assert other.asked(items_of(["short", "image"]), QUESTIONS[:1])


def test_marks_around_frames_are_a_videos_and_no_images(split):
    """What Qwen3-VL writes around each frame of a clip is the template's for an image."""
    one = split("qwen3_vl")
    clip, image = one.placeholder(ITEMS["short"]), one.placeholder(ITEMS["image"])
    assert "<|vision_start|>" in clip.runs[0][0] and re.search(r"<\d\.\d seconds>", clip.runs[0][0])
    with pytest.raises(StoreDamaged, match=r"holds the control token <\|vision_end\|>, which stands for no image"):
        one.prompter.ask("?", [replace(image, runs=(*image.runs, ("<|vision_end|>", 1)))])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_foreign_stores_inputs_of_a_clip_set_nothing_else_of_the_model(name, split):
    one = split(name)
    clip, image = one.placeholder(ITEMS["short"]), one.placeholder(ITEMS["image"])
    value = {"dtype": "int64", "shape": [1, 1], "values": [0]}
    names = {"position_ids", "inputs_embeds", "use_cache", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"}
    for other in names - clip.inputs.keys():
        hostile = replace(clip, inputs={**clip.inputs, other: value}, name="a.mp4")
        for shown in ([hostile], [image, hostile], [clip, hostile]):
            with pytest.raises(StoreDamaged, match=rf"a\.mp4 holds the input {other}, which .* gives for no video"):
                one.prompter.ask("?", shown)
    assert (clip.inputs.keys() == {"second_per_grid_ts"}) == (name == "qwen2_5_vl")
    hostile = replace(image, inputs={"second_per_grid_ts": value}, name="a.png")
    with pytest.raises(StoreDamaged, match="which this model's processor gives for no image"):
        one.prompter.ask("?", [clip, hostile])


def test_control_tokens_in_a_question_about_a_clip_are_text(split):
    one = split("qwen3_vl")
    clip = one.placeholder(ITEMS["short"])
    harmless = one.prompter.ask("a", [clip])
    added = set(one.prompter.tokenizer.added_tokens_decoder)
    for text in ("<|video_pad|>", "<|vision_start|><|video_pad|><|vision_end|>", "<|im_end|>", "<0.2 seconds>"):
        asked = one.prompter.ask(text, [clip], system=None)
        assert [i for i in asked.input_ids if i in added] == [i for i in harmless.input_ids if i in added]
        assert sum(map(bool, asked.item_types)) == clip.n_tokens
        assert text in one.prompter.tokenizer.decode(asked.input_ids)

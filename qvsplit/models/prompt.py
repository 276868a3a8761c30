"""A question about images and videos to tokens, as the checkpoint's own processor would give them on the pixels.

Each item's placeholder, as it is stored beside its features, takes the place of the template's own token for it; no
pixels and no code per family are needed. Before the first prompt of each kind (an image, a video, several, both
together) that is proved on small items against the processor's own call: a family whose prompts cannot be rebuilt so is
refused. User text is only ever text: whatever it contains (`<|image_pad|>`, `<|im_end|>`), its tokens are ordinary
ones; and a stored placeholder may hold no control token but those that its own processor puts there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.model_class import class_of, forward_takes, takes_videos
from qvsplit.errors import ModelError, RequestError, StoreDamaged, UsageError, some_of
from qvsplit.models.processor_proof import (
    KINDS,
    Proof,
    process,
    prove,
    samples,
    small_images,
    template_options,
)
from qvsplit.store.row import Row, Runs

Grid = tuple[int, int, int]
# {"role": …, "content": text, or a list of {"type": "image"}, {"type": "video"} and {"type": "text", …}}
Message = Mapping[str, Any]

ITEM_TYPES = {"image": 1, "video": 2}  # in `Prompt.item_types`; 0 is text
MAX_PLACEHOLDER_TEXT = 1 << 20  # characters of plain text in one placeholder: timestamps, row marks
_SAID = {"user": "a question", "assistant": "an earlier answer", "system": "the system message"}
_DIGITS = re.compile(r"\d+")
# no tokenizer known to us does this; a silently different prompt would be worse than stopping
_NO_PLAIN_TEXT = "{}: its tokenizer made control tokens of plain text; nothing was asked"


@dataclass(frozen=True)
class Placeholder:
    """What stands in a prompt for one image or video, and what the language model is given with its features.

    Attributes:
        runs: The text, as runs of (text, count).
        n_tokens: How many rows of features go there.
        grid_thw: Patches in time, height and width, where the family has such a grid.
        kind: `image` or `video`.
        name: For messages.
        inputs: Other small inputs of the language model: name → dtype, shape, values.
    """

    runs: Runs
    n_tokens: int
    grid_thw: Grid | None = None
    kind: str = "image"
    name: str = "an image"
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_row(cls, row: Row) -> Placeholder:
        """Give that of a stored row. StoreDamaged if it holds none."""
        try:
            runs, inputs = row.placeholder_runs, row.inputs_by_name
        except ValueError as error:
            raise StoreDamaged(f"the row of {row.path} {error}; run `qvsplit extract` again") from None
        if not runs or row.n_tokens is None:
            raise StoreDamaged(f"the row of {row.path} lacks placeholder or token count; run `qvsplit extract` again")
        return cls(runs, row.n_tokens, row.grid_thw, row.kind, row.name, inputs)


@dataclass(frozen=True)
class Prompt:
    """One conversation, ready for the language model.

    Attributes:
        input_ids: Tokens.
        item_types: One a token: 0 is text; where a row of features goes, its item's kind in `ITEM_TYPES`.
        token_types: What else the processor says of every token, by the name of the model's input.
        placeholders: One an item.
    """

    input_ids: list[int]
    item_types: list[int]
    token_types: Mapping[str, list[int]]
    placeholders: list[Placeholder]

    @property
    def prefix_tokens(self) -> int:
        """How many tokens the prompt has up to its last item, that included: what every question shares."""
        return next((end for end in range(len(self.item_types), 0, -1) if self.item_types[end - 1]), 0)

    def grids(self, kind: str) -> list[Grid]:
        """Give the grids of the items of this kind, in order."""
        return [one.grid_thw for one in self.placeholders if one.kind == kind and one.grid_thw is not None]

    def begins_with(self, items: int) -> bool:
        """Say whether the first `items` come before all others in the text, too: some templates put images first."""
        first, wanted = self.placeholders[:items], Counter[int]()
        for one in first:
            wanted[ITEM_TYPES[one.kind]] += one.n_tokens
        shown = [kind for kind in self.item_types if kind]
        return Counter(shown[: wanted.total()]) == wanted

    def upto(self, items: int) -> Prompt:
        """Give the prompt's beginning, up to the end of its item number `items`, counted from one."""
        wanted = sum(one.n_tokens for one in self.placeholders[:items])
        counts = accumulate(map(bool, self.item_types))
        end = next(place for place, count in enumerate(counts, 1) if count == wanted)
        types = {name: values[:end] for name, values in self.token_types.items()}
        return Prompt(self.input_ids[:end], self.item_types[:end], types, self.placeholders[:items])


class Prompter:
    """Processor, tokenizer and chat template of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = hf.load_config(checkpoint)
        self.processor = hf.load_processor(checkpoint)
        self.tokenizer = self.processor.tokenizer
        self.folder = checkpoint.folder
        self.model_class = class_of(checkpoint)
        self.model_takes = forward_takes(self.model_class)
        self._takes_bare_prompts = checkpoint.family.takes_bare_prompts
        self._added = {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items()}
        # the tokens where rows of features go; a processor may have others in the text that it expands
        self._image_token = hf.image_token(checkpoint, config, self.tokenizer)
        self._configured_video_token = hf.video_token(config, self.processor)
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._text_options: dict[bool, dict[str, Any]] = {}
        self._takes_strings: dict[str, bool] = {}  # by role
        self._own: dict[str, frozenset[str]] = {}  # by kind of item
        self._proofs: dict[tuple[int, int], Proof] = {}  # by how many images and videos a prompt shows

    def ask(
        self, question: str, placeholders: Sequence[Placeholder], *, system: str | None = None, thinking: bool = False
    ) -> Prompt:
        """Give the prompt of one question about these items, items first."""
        messages = question_messages(question, [one.kind for one in placeholders], system)
        return self.chat(messages, placeholders, thinking=thinking)

    def chat(
        self, messages: Sequence[Message], placeholders: Sequence[Placeholder], *, thinking: bool = False
    ) -> Prompt:
        """Give the prompt of any conversation.

        Args:
            messages: The conversation.
            placeholders: Those of its items, in order.
            thinking: Whether the model may think first, where its chat template has a switch for that.

        Raises:
            UsageError: Items and conversation differ, or the family does not take such items together.
            ModelError: This model's prompts cannot be made without pixels.
            RequestError: Only those that show videos cannot, this text is none to its tokenizer, or its chat template
                takes no such conversation, or writes something of it otherwise than it was said.
            StoreDamaged: A placeholder is not one that its processor makes.
        """
        kinds = _item_kinds(messages)
        if len(kinds) != len(placeholders):
            raise UsageError(
                f"the conversation shows {len(kinds)} images and videos, and {len(placeholders)} were given"
            )
        for kind, one in zip(kinds, placeholders, strict=True):
            if kind != one.kind:
                raise UsageError(f"the conversation shows {kind} where {one.name}, which is {one.kind}, was given")
        proof = self._proof(kinds)
        for one in placeholders:
            _check_inputs(one, proof)
        ids, types = self._tokens(messages, placeholders, thinking=thinking)
        beginning = proof.missing_beginning(ids)
        ids, types = [*beginning, *ids], [*[0] * len(beginning), *types]
        return Prompt(ids, types, proof.token_types(self.processor, ids), list(placeholders))

    def _tokens(
        self, messages: Sequence[Message], placeholders: Sequence[Placeholder], *, thinking: bool
    ) -> tuple[list[int], list[int]]:
        """Give token ids and item types of a conversation.

        The tokenizer sees every run of an item's token as one: the added tokens of a text part it, however many stand
        side by side. The runs are laid out afterwards.
        """
        for text in _texts(messages):
            _check_characters(text)
        short: dict[str, list[str]] = {kind: [] for kind in KINDS}
        counts: dict[str, list[int]] = {one.kind: [] for one in placeholders}
        for one in placeholders:
            text, runs = self._shortened(one)
            short[one.kind].append(text)
            counts[one.kind] += runs
        marked = self._marked(messages)
        rendered = self._render(marked, thinking=thinking)
        self._check_rendered(rendered, marked)
        text = self._with_placeholders(rendered, short)
        ids = self._encode(text, begins_with_bos=self._begins_with_bos(rendered))
        return self._laid_out(ids, {kind: iter(runs) for kind, runs in counts.items()})

    def _laid_out(self, ids: Sequence[int], counts: Mapping[str, Iterator[int]]) -> tuple[list[int], list[int]]:
        """Repeat every item's token as often as its run has it. RequestError if there are more or fewer than runs."""
        kinds = {self._id_of(token): "image" for token in self._item_tokens}
        kinds |= {self._id_of(self._item_token(kind)): kind for kind in counts}
        laid: list[int] = []
        types: list[int] = []
        for token in ids:
            kind = kinds.get(token)
            count = 1 if kind is None else next(counts[kind], 0) if kind in counts else 0
            laid += [token] * count
            types += [0 if kind is None else ITEM_TYPES[kind]] * count
            if not count:
                raise RequestError(f"{self.folder}: its chat template or tokenizer shows more items than were given")
        for kind, rest in counts.items():
            if next(rest, None) is not None:
                raise RequestError(f"{self.folder}: its chat template or tokenizer shows fewer {kind}s than were given")
        return laid, types

    @property
    def _item_tokens(self) -> set[str]:
        """The tokens of which config.json says that rows of features go there."""
        return {token for token in (self._image_token, self._configured_video_token) if token is not None}

    def _item_token(self, kind: str) -> str:
        """Give the token that stands where one row of the features of such an item goes. RequestError if none does."""
        return self._image_token if kind == "image" else self._video_token

    @cached_property
    def _video_token(self) -> str:
        """That of videos: some families show their frames as images. RequestError: the model answers about none."""
        if not takes_videos(self.model_class):
            raise RequestError(
                f"{self.folder} cannot answer about videos: {self.model_class.__name__} of transformers has no "
                "get_video_features; ask about images, or name another checkpoint as `model`"
            )
        (clip, *_) = samples("video")
        _, text = process(self.processor, clip, where=self.folder)
        token = hf.token_shown(text, self._configured_video_token, self._image_token)
        if token is not None:
            return token
        raise RequestError(
            f"{self.folder} cannot answer about videos: its processor shows one without any of its tokens"
        )

    def _id_of(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))

    # -------------------------------------------------------------------------------------------------- placeholders

    def _shortened(self, one: Placeholder) -> tuple[str, list[int]]:
        """Give a placeholder with one item token for every run of them, and how long these runs are.

        A store may come from anywhere: what it says must not end a turn or begin another. StoreDamaged for control
        tokens that the family's processor puts into no placeholder, or a wrong count.
        """
        token = self._item_token(one.kind)
        pieces: list[str] = []
        rows = characters = 0
        for text, count in one.runs:
            parts = [part for part in self._split.split(text) if part]
            rows += count * parts.count(token)
            characters += count * sum(len(part) for part in parts if part != token)
            if rows > one.n_tokens or characters > MAX_PLACEHOLDER_TEXT:
                break  # before it is laid out: a count may be anything
            pieces += parts * count
        if rows != one.n_tokens or characters > MAX_PLACEHOLDER_TEXT:
            raise StoreDamaged(
                f"the placeholder of {one.name} does not have the {one.n_tokens:,} {one.kind} tokens of its features; "
                "the store was not written by qvsplit, or damaged"
            )
        runs = [(piece, len([*same])) for piece, same in groupby(pieces)]
        text = "".join(piece if piece == token else piece * count for piece, count in runs)
        # of the whole text: two runs may join into a control token
        found = {part for part in self._split.split(text) if part in self._added} - {token}
        self._check_control_tokens(one, found | {mark for mark in _marks() if mark in text})
        return text, [count for piece, count in runs if piece == token]

    def _check_control_tokens(self, one: Placeholder, tokens: set[str]) -> None:
        foreign = sorted(t for t in tokens if not t.isspace() and not self._is_own(t, one.kind))
        if foreign:
            raise StoreDamaged(
                f"the placeholder of {one.name} holds the control token {foreign[0]}, which stands for no {one.kind}; "
                "the store was not written by qvsplit, or damaged"
            )

    def _is_own(self, token: str, kind: str) -> bool:
        """Say whether the family's processor puts this control token into placeholders of this kind."""
        return _DIGITS.sub("#", token) in self._own_control_tokens(kind)

    def _own_control_tokens(self, kind: str) -> frozenset[str]:
        """Give the control tokens that the processor puts there, numbers in them as `#`: rows and columns."""
        if kind not in self._own:
            texts = [process(self.processor, item, where=self.folder)[1] for item in samples(kind)]
            found = {part for text in texts for part in self._split.split(text) if part in self._added}
            self._own[kind] = frozenset(_DIGITS.sub("#", token) for token in found)
        return self._own[kind]

    def _with_placeholders(self, rendered: str, texts: Mapping[str, list[str]]) -> str:
        """Put each item's text in place of the template's token for it, as the processor does it."""
        processor, shown = self.processor, dict(texts)
        filled = rendered
        if any(shown.values()):  # some processors change the text by where its items stand
            hidden, marked = self._without_marked(rendered)
            images = small_images([(8, 8)] * len(shown["image"])) or None
            _, (filled, *_), *_ = processor.prepare_inputs_layout(images=images, text=[hidden])
            for stand_in, token in marked.items():
                filled = filled.replace(stand_in, token)
            if hasattr(processor, "_prepend_local_ids") and processor.default_use_image_id:
                for kind, token in (("image", processor.image_token), ("video", processor.video_token)):
                    shown[kind] = processor._prepend_local_ids([token * len(shown[kind])], shown[kind], token)
        try:
            (filled, *_), (places, *_) = processor.get_text_with_replacements([filled], shown["image"], shown["video"])
        except StopIteration:
            raise RequestError(f"{self.folder}: its chat template shows more items than were given") from None
        self._check_edges(filled, {edge for place in places for edge in place["new_span"]})
        return str(filled)

    def _check_edges(self, text: str, edges: set[int]) -> None:
        """Raise StoreDamaged where a placeholder and the text beside it join into a control token.

        Line breaks may join: some tokenizers have runs of them among their added tokens.
        """
        for found in self._split.finditer(text):
            if not found.group().isspace() and any(found.start() < edge < found.end() for edge in edges):
                raise StoreDamaged(
                    f"a placeholder joins into the control token {found.group()} with the text beside it; the store "
                    "was not written by qvsplit, or damaged"
                )

    def _without_marked(self, rendered: str) -> tuple[str, dict[str, str]]:
        """Put stand-ins in place of the control tokens that users wrote: processors look for image tokens in a text."""
        start, end = _marks()
        fence = next(chr(c) for c in range(0xE000, 0x110000) if chr(c) not in rendered)
        marked: dict[str, str] = {}

        def hide(found: re.Match[str]) -> str:
            stand_in = f"{fence}{len(marked)}{fence}"
            marked[stand_in] = found.group()
            return stand_in

        return re.sub(f"{start}.*?{end}", hide, rendered), marked

    # ---------------------------------------------------------------------------------------------------------- text

    @cached_property
    def _user_control_tokens(self) -> re.Pattern[str]:
        """Match the control tokens that users may not write.

        These are special ones, and those that the chat template or a placeholder writes. Others are ordinary text to
        the full model, too: tokenizers have runs of blanks among their added tokens.
        """
        template = str(self.processor.chat_template)
        control = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special
            or (not token.content.isspace() and (token.content in template or self._is_any_own(token.content)))
        ]
        control += [token for token in self._item_tokens if token not in control]
        return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))

    def _is_any_own(self, token: str) -> bool:
        if self._is_own(token, "image"):
            return True
        with suppress(RequestError):  # of a model that answers about no videos
            return bool(self._video_token) and self._is_own(token, "video")
        return False

    def _marked(self, messages: Sequence[Message]) -> list[Message]:
        """Mark the control tokens in users' texts, so that they are tokenized as text."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        if not any(self._user_control_tokens.search(text) for text in _texts(messages)):
            return list(messages)
        marked: list[Message] = []
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                content = mark_control_tokens(content, self._user_control_tokens)
            else:
                content = [
                    {**part, "text": mark_control_tokens(part["text"], self._user_control_tokens)}
                    if "text" in part
                    else part
                    for part in content
                ]
            marked.append({**message, "content": content})
        return marked

    def _render(self, messages: Sequence[Message], *, thinking: bool) -> str:
        if not self.processor.chat_template and self._takes_bare_prompts:
            return self._bare(messages)
        return self._by_template([self._as_taken(message) for message in messages], thinking=thinking)

    def _by_template(self, messages: Sequence[Message], *, thinking: bool = False) -> str:
        options = template_options(self.processor, thinking=thinking)
        try:
            return str(
                self.processor.apply_chat_template(
                    [dict(message) for message in messages], add_generation_prompt=True, tokenize=False, **options
                )
            )
        except Exception as error:  # a template is a program of the checkpoint's: it may raise anything
            raise RequestError(f"{self.folder}: its chat template does not take this conversation ({error})") from error

    def _check_rendered(self, rendered: str, messages: Sequence[Message]) -> None:
        """Raise RequestError unless every text stands in it whole, in order and with its marks, blanks around it aside.

        Templates take turns apart: at a mark of reasoning, say. Half of a marked token would leave a stray mark.
        """
        at = 0
        for message in messages:
            for text in _texts([message]):
                is_system = message["role"] == "system"  # templates write it anywhere
                found = rendered.find(text.strip(), 0 if is_system else at)
                if found < 0:
                    raise self._said_otherwise(_SAID.get(message["role"], "what was said"), [text])
                at = at if is_system else found + len(text.strip())
        start, end = _marks()
        wanted = sum(text.count(start) for text in _texts(messages))
        if "".join(re.findall(f"[{start}{end}]", rendered)) != (start + end) * wanted:
            raise self._said_otherwise("what was said", _texts(messages))

    def _said_otherwise(self, what: str, texts: Sequence[str]) -> RequestError:
        tokens = some_of({token for text in texts for token in self._user_control_tokens.findall(text)})
        advice = f"leave {tokens} out of it" if tokens else "put it in other words"
        return RequestError(f"{self.folder}: its chat template does not write {what} as it was said; {advice}")

    def _as_taken(self, message: Message) -> Message:
        """Give a message as the template takes it: many leave out, silently, a content that is a plain string.

        Raises:
            UsageError: It takes no text of this role.
        """
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            return message
        if role not in self._takes_strings:
            self._takes_strings[role] = self._tried_with_strings(role)
        return message if self._takes_strings[role] else {**message, "content": _parts(content)}

    def _tried_with_strings(self, role: str) -> bool:
        said = "qvsplit"
        for content in (said, _parts(said)):
            tried: list[Message] = [{"role": role, "content": content}]
            if role != "user":
                tried.append({"role": "user", "content": _parts("?")})
            if role == "assistant":
                tried.insert(0, {"role": "user", "content": _parts("?")})
            with suppress(ModelError):
                if said in self._by_template(tried):
                    return isinstance(content, str)
        raise UsageError(f"{self.folder}: its chat template takes no {role} message")

    def _bare(self, messages: Sequence[Message]) -> str:
        """Give the items, then the text, as families take them whose checkpoints have no chat template."""
        if any(message["role"] != "user" for message in messages):
            raise UsageError(f"{self.folder} has no chat template: it takes no system message and no earlier answers")
        shown = "".join(getattr(self.processor, f"{kind}_token") for kind in _item_kinds(messages))
        return shown + "".join(_texts(messages))

    def _begins_with_bos(self, rendered: str) -> bool:
        bos = self.tokenizer.bos_token
        return bos is not None and rendered.startswith(bos)

    def _encode(self, text: str, *, begins_with_bos: bool) -> list[int]:
        """Tokenize a rendered conversation as the processor would: no second BOS where the template wrote one."""
        from transformers.utils import chat_template_utils

        if begins_with_bos not in self._text_options:
            more = {"add_special_tokens": False} if begins_with_bos else {}
            merged = self.processor._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **more)
            kept = ("add_special_tokens", "split_special_tokens")
            self._text_options[begins_with_bos] = {
                name: value for name, value in merged["text_kwargs"].items() if name in kept
            }
        options = self._text_options[begins_with_bos]
        if chat_template_utils._CONTROL_TOKEN_START not in text:
            return list(self.tokenizer(text, **options)["input_ids"])
        before, behind = self._added_around(options)
        try:
            ids = chat_template_utils.encode_marked_chat(self.tokenizer, text)
        except ValueError:
            raise RequestError(_NO_PLAIN_TEXT.format(self.folder)) from None
        return [*before, *ids, *behind]

    def _added_around(self, options: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Give the tokens that the tokenizer adds before and behind a text, which what encodes marked text does not."""
        whole = list(self.tokenizer("x", **options)["input_ids"])
        bare = list(self.tokenizer("x", **{**options, "add_special_tokens": False})["input_ids"])
        start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    def text_tokens(self, text: str) -> list[int]:
        """Tokenize plain text; what looks like a control token in it is text as well."""
        ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        slipped = set(ids) & {number for token, number in self._added.items() if token in text}
        if slipped and self._user_control_tokens.search(text):
            raise RequestError(_NO_PLAIN_TEXT.format(self.folder))
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Give answer tokens as text, without control tokens."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    # --------------------------------------------------------------------------------------------------------- proof

    def _proof(self, kinds: Sequence[str]) -> Proof:
        """Give the proof that prompts which show such items are the processor's own. Raises if they are not.

        UsageError where only several are not: the family prepares an item in another way where others stand beside it.
        """
        count = Counter(kinds)
        images, videos = min(count["image"], 2), min(count["video"], 2)
        if (images, videos) not in self._proofs:
            self._check_template()
            if videos and self._video_token == self._image_token and images:
                raise UsageError(
                    f"{self.folder}: its model cannot tell videos from images in one prompt; ask about images or about "
                    "videos"
                )
            # without any item, what is said of tokens is what is said beside an image
            try:
                self._proofs[images, videos] = prove(self, images or int(not videos), videos)
            except ModelError as error:
                is_own = videos or (images > 1 and isinstance(error, RequestError))  # one image: nothing can be asked
                raise (RequestError if is_own else ModelError)(*error.args) from None
        return self._proofs[images, videos]

    def _check_template(self) -> None:
        """Raise ModelError for a chat template that changes what users say, but for blanks around it."""
        said = "a <|B|> c\n\nD"
        try:
            rendered = self._render(question_messages(said, []), thinking=False)
        except RequestError as error:
            raise ModelError(
                f"{self.folder} has no usable chat template ({error.__cause__}); download it again"
            ) from None
        if said not in rendered:
            raise ModelError(f"{self.folder}: its chat template rewrites what users say; qvsplit cannot use it exactly")

    def proof_prompt(self, shown: Sequence[tuple[str, str]], question: str) -> list[int]:
        """Give the tokens of a question about items, of each its kind and text, without any proof that they are right.

        RequestError: The model answers about no videos.
        """
        placeholders = [self.placeholder_of(text, kind) for kind, text in shown]
        messages = question_messages(question, [one.kind for one in placeholders])
        return self._tokens(messages, placeholders, thinking=False)[0]

    def placeholder_of(self, text: str, kind: str = "image") -> Placeholder:
        """Give the placeholder of an item that the processor stands for by `text`."""
        return Placeholder(((text, 1),), text.count(self._item_token(kind)), kind=kind, name=f"a small {kind}")


def _check_inputs(one: Placeholder, proof: Proof) -> None:
    """Raise StoreDamaged for inputs that no such item has by the processor: a store must not set what a model takes."""
    if foreign := one.inputs.keys() - proof.inputs.get(one.kind, frozenset()):
        raise StoreDamaged(
            f"the row of {one.name} holds the input {min(foreign)}, which this model's processor gives for no "
            f"{one.kind}; the store was not written by qvsplit, or damaged"
        )


def question_messages(
    question: str, kinds: Sequence[str], system: str | None = None, earlier: Sequence[tuple[str, str]] = ()
) -> list[Message]:
    """Give the conversation of one question about items of these kinds, items first.

    `earlier` are the questions asked before it, each with its answer: then the items stand before the first of them.
    """
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    shown: list[dict[str, str]] = [{"type": kind} for kind in kinds]
    for asked, answer in earlier:
        messages += [{"role": "user", "content": [*shown, *_parts(asked)]}, {"role": "assistant", "content": answer}]
        shown = []
    return [*messages, {"role": "user", "content": [*shown, *_parts(question)]}]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _check_characters(text: str) -> None:
    """Raise UsageError for what is no text, and for the two private characters by which control tokens are marked."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("a question holds bytes that are not UTF-8; give it as UTF-8 text")
    if any(mark in text for mark in _marks()):
        raise UsageError("a question holds U+F0000 or U+F0001, which transformers keeps to itself; leave them out")


def _marks() -> tuple[str, str]:
    from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START

    return _CONTROL_TOKEN_START, _CONTROL_TOKEN_END


def _item_kinds(messages: Sequence[Message]) -> list[str]:
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [part["type"] for content in contents for part in content if part.get("type") in ITEM_TYPES]


def _texts(messages: Sequence[Message]) -> list[str]:
    texts = []
    for message in messages:
        if isinstance(message["content"], str):
            texts.append(message["content"])
        else:
            texts += [part["text"] for part in message["content"] if "text" in part]
    return texts

"""Features and tokens to tokens: the language model, loaded alone.

In: a `Prompt` and the features of its items. The prompt up to its last item is prefilled once (`prefill`); then any
number of questions behind any number of such prefixes are answered (`generate`), or their choices are given their
probabilities (`score`). With kernels "reference" scores are to the bit those of the full model on the pixels, with
"fused" the same within rounding, which decides a token only where two are as good as equally likely. How it is done
depends on the model's layers: `ways.py` says which way is whose. Knows nothing of pixels, files or encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints import families
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.hf import quiet_transformers
from qvsplit.errors import ModelError, OutOfMemory
from qvsplit.models.asking import NOT_FINITE, Choices, PrefixedQuestion
from qvsplit.models.decoding import AnswerRules, Constraint, Decoding, GrowingAnswer, logits_processors
from qvsplit.models.forward import Forward
from qvsplit.models.prompt import Prompt, Prompter
from qvsplit.models.ways import way_of
from qvsplit.runtime.devices import dtype_name, is_out_of_memory
from qvsplit.runtime.loading import PROCESSOR, OnLoad, nobody
from qvsplit.store.features import Features
from qvsplit.weights import load_language_model

if TYPE_CHECKING:
    import torch

    from qvsplit.models.prefix_cache import Beginning


@dataclass(frozen=True)
class Generated:
    """Answer tokens without the prompt's, their text, and why they end.

    `stop`: the model said so, or a stop string came, which the text ends before; `length`: no more were allowed;
    `cancelled`: the caller said so; `error`: the model computed no numbers, and `error` says so. `reasoning` is what
    the model thought before it answered.
    """

    tokens: list[int]
    text: str
    finish_reason: str
    error: ModelError | None = None
    reasoning: str = ""


@dataclass(frozen=True)
class GenerateOptions:
    """Options of `generate`, beside the questions.

    Attributes:
        constraint: Makes what an answer must conform to, anew for every answer.
        on_text: Hears a question's number and more of its answer's text as it grows.
        is_cancelled: Asked before every token; where it says so, the answers end as they are.
    """

    constraint: Callable[[], Constraint] | None = None
    on_text: Callable[[int, str], None] | None = None
    is_cancelled: Callable[[], bool] = lambda: False


class LanguageModel:
    """The language model of one checkpoint.

    Attributes:
        model: transformers' full class without its encoder.
        prompter: Questions to prompts, tokens to text.
        way: How questions about an item are answered, in a few words: see models/ways.py.
        note: One sentence for users where these questions cannot share the item's prefix.
        kernels: "fused", or "reference": see `ways.py`.
    """

    def __init__(self, model: Any, prompter: Prompter, prefix: families.Prefix, kernels: str = "fused") -> None:
        self.model = model
        self.prompter = prompter
        self._forward = Forward(model)
        self.kernels = kernels
        self._way, self.note = way_of(self._forward, prefix, lambda: sorted(self.stops), kernels)
        self.way: str = self._way.name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self._forward.device

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        stops = self.model.generation_config.eos_token_id
        if stops is None:
            raise ModelError(f"{self.prompter.folder}: its generation_config.json names no eos_token_id; nothing ends")
        return frozenset(stops if isinstance(stops, list) else [stops])

    @property
    def can_extend(self) -> bool:
        """Whether `prefill` takes a beginning to go on from."""
        return self._way.can_extend

    # ------------------------------------------------------------------------------------------------------ prefix

    def prefill(self, prompt: Prompt, features: Sequence[Features], *, after: Beginning | None = None) -> Beginning:
        """Compute the prefix of `prompt` up to its last item.

        Args:
            prompt: The whole prompt.
            features: Those of its items.
            after: A prefix of that very beginning: only the rest is computed, and `features` are the rest's. Not for a
                model that cannot extend one.

        Raises:
            ValueError: Features and prompt do not belong together.
            OutOfMemory: They do not fit.
        """
        import torch

        known, end = (len(after) if after else 0), prompt.prefix_tokens
        if after is not None and list(after.input_ids) != prompt.input_ids[:known]:
            raise ValueError("the prompt does not begin with that prefix")
        self._check(prompt.item_types[known:end], features)
        with torch.inference_mode(), quiet_transformers(), _memory_errors(end):
            return self._way.prefill(prompt, features, after)

    def _check(self, types: Sequence[int], features: Sequence[Features]) -> None:
        width = self.model.config.get_text_config().hidden_size
        tensors = [tensor for one in features for tensor in one.tensors.values()]
        expected, rows = sum(map(bool, types)), sum(one.n_tokens for one in features)
        if rows != expected:
            raise ValueError(f"{expected} tokens of items in the prompt, {rows} rows of features")
        if any(tensor.width != width for tensor in tensors):
            raise ValueError(f"features {[tensor.width for tensor in tensors]} wide, the model is {width} wide")

    # ----------------------------------------------------------------------------------------------------- answers

    def generate(
        self, questions: Sequence[PrefixedQuestion], decoding: Decoding, options: GenerateOptions | None = None
    ) -> list[Generated]:
        """Answer `questions`, each answer ending by itself. OutOfMemory if they do not fit together."""
        import torch

        options = options or GenerateOptions()
        answers = [self._growing(number, one, decoding, options) for number, one in enumerate(questions)]
        with torch.inference_mode(), quiet_transformers(), _memory_errors(self.tokens(questions)):
            self._way.generate(questions, answers, options.is_cancelled)
        return [
            Generated(
                one.tokens, one.text, one.finish_reason or "length",
                self._not_finite() if one.finish_reason == NOT_FINITE else None, one.reasoning,
            )
            for one in answers
        ]  # fmt: skip

    def _growing(
        self, number: int, question: PrefixedQuestion, decoding: Decoding, options: GenerateOptions
    ) -> GrowingAnswer:
        on_text = options.on_text
        prompt = [*question.prefix.input_ids, *question.suffix]
        rules = AnswerRules(
            decoding, self.stops, self.prompter.decode, logits_processors(self.model, decoding, len(prompt)),
            constraint=options.constraint() if options.constraint else None, seed=question.seed,
            on_text=(lambda text: on_text(number, text)) if on_text else None,
        )  # fmt: skip
        return GrowingAnswer(rules, prompt)

    def score(self, questions: Sequence[PrefixedQuestion], choices: Choices) -> list[list[float] | ModelError]:
        """Give log-probabilities of whole answers: for each question, of each of its `choices` and the end after it.

        A question for which the model computes no numbers has an error instead.
        """
        import torch

        with torch.inference_mode(), quiet_transformers(), _memory_errors(self.tokens(questions)):
            scores = self._way.score(questions, choices)
        return [self._not_finite() if mine is None else mine for mine in scores]

    def tokens(self, questions: Sequence[PrefixedQuestion]) -> int:
        """Count the tokens in memory for a batch."""
        return self._way.tokens(questions)

    def _not_finite(self) -> ModelError:
        return ModelError(
            f"{self.prompter.folder} computes values that are not finite in {dtype_name(self.dtype)}; try a wider "
            "`dtype`, or download it again"
        )


@contextmanager
def _memory_errors(tokens: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"a prompt of {tokens:,} tokens does not fit into memory beside the model; ask fewer items together, or "
            "try another `device` or a narrower `dtype`"
        ) from None


def load(
    checkpoint: Checkpoint,
    *,
    device: torch.device | None,
    dtype: torch.dtype | None,
    device_map: str | None = None,
    kernels: str = "fused",
    on_load: OnLoad = nobody,
) -> LanguageModel:
    """Load the language model on `device`, or spread by `device_map` as transformers and accelerate do.

    `kernels` is "fused" or "reference", all of whose modules are transformers' own. `on_load` hears of each part.
    """
    on_load(PROCESSOR, 0, 0)
    prompter = Prompter(checkpoint)
    mapped: str | dict[str, Any] | None = device_map
    if device_map is None and device is not None and device.type != "cpu":
        mapped = {"": device}
    model = load_language_model(checkpoint, dtype=dtype, device_map=mapped, kernels=kernels, on_load=on_load)
    return LanguageModel(model, prompter, checkpoint.family.prefix, kernels)

"""The language model's forward pass: tokens and positions in, hidden states and scores out.

What a prompt and its features become on the way in: `mm_encoder_outputs`, grids and other small inputs, token types,
rotary positions. No family is named here: what a model takes is read off the signatures of its methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qvsplit.errors import StoreDamaged, some_of
from qvsplit.runtime.devices import is_out_of_memory
from qvsplit.store.features import DEEPSTACK_FEATURES, LIST, POOLER_OUTPUT, Features

if TYPE_CHECKING:
    import torch

    from qvsplit.models.prompt import Placeholder, Prompt

# what a processor calls it, and what the model's get_rope_index calls it
ROPE_NAMES = {"video_second_per_grid": "second_per_grids"}


class Forward:
    """The forward pass of transformers' full class without its encoder.

    `_rope_index` is the rule for positions of models that count time, height and width; None for those with one count.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.takes = _parameters(type(model).forward)
        owners: list[Any] = [getattr(model, "model", None), model]
        self._rope_index = next((one.get_rope_index for one in owners if hasattr(one, "get_rope_index")), None)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def is_spread(self) -> bool:
        """Whether hooks move weights about, so that every layer must run to its end."""
        return hasattr(self.model, "hf_device_map")

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor | None, cache: Any, **more: Any) -> torch.Tensor:
        """Give hidden states [B, q, width] of `ids` [B, q] at text `positions` [B, q], or at all kinds [3, B, q]."""
        if positions is not None and positions.ndim == 2 and self._rope_index is not None:
            positions = positions.expand(3, -1, -1)
        given = {"input_ids": ids, "position_ids": positions, self._cache_name: cache, **more}
        out = self.model.model(**given, use_cache=True)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Give scores over the vocabulary of hidden states […, width], in float32 as transformers' generate has them.

        The output layer is all that the full class computes on top, in every family that this is used for.
        """
        scores: torch.Tensor = self.model.lm_head(hidden).float()
        return scores

    def prefill(
        self, prompt: Prompt, features: Sequence[Features], cache: Any, *, known: int = 0, first: int = 0
    ) -> int:
        """Run the prompt up to its last item; gives the position of a text token right behind.

        Args:
            prompt: The whole prompt.
            features: Those of the items behind the known tokens.
            cache: What keeps keys and values. It may raise Complete before the last layer is done.
            known: How many tokens at the beginning the cache has already.
            first: The position of the next one, if it is a text token.
        """
        import torch

        from qvsplit.models.prefix_cache import Complete

        end = prompt.prefix_tokens
        ids = torch.tensor([prompt.input_ids[known:end]], device=self.device)  # [1, n]
        types = {name: values[known:end] for name, values in prompt.token_types.items()}
        given = self._only_taken(model_inputs(prompt.placeholders, features, types, self.device))
        positions, following = self._rope_positions(prompt, end)
        if positions is not None:
            positions = positions[:, :, known:]
        elif known:
            positions = torch.arange(first, first + ids.shape[1], device=self.device)[None]
        with self._positions_given() as seen, suppress(Complete):
            self.hidden(ids, positions, cache, **given)
        return following if following is not None else seen[0] if seen else end

    def check_positions(self, prompt: Prompt) -> None:
        """Raise StoreDamaged where the model's rule finds no positions for the items of a prompt."""
        self._rope_positions(prompt, prompt.prefix_tokens)

    def _only_taken(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in given.items() if name in self._takes_without_head}

    @cached_property
    def _takes_without_head(self) -> frozenset[str]:
        return _parameters(type(self.model.model).forward)

    @cached_property
    def _cache_name(self) -> str:
        """The name of the argument for the cache: transformers 5.24 gave it another."""
        return "cache" if "cache" in self._takes_without_head else "past_key_values"

    @contextmanager
    def _positions_given(self) -> Iterator[list[int]]:
        """Note the position behind the last one that the model gives its decoder, unless it leaves that to it."""
        seen: list[int] = []

        def note(module: Any, args: Any, named: Mapping[str, Any]) -> None:
            if (positions := named.get("position_ids")) is not None:
                seen.append(int(positions.max()) + 1)

        handle = self.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()

    def _rope_positions(self, prompt: Prompt, end: int) -> tuple[torch.Tensor | None, int | None]:
        """Give positions [3, 1, end] of the prompt's first `end` tokens, and that of the text token behind.

        The latter is what the model's own rule gives a token that stands there. `end` plus `rope_deltas`, which is one
        more than the largest position, is another behind a video that has more frames than rows and columns.
        None for a model that has but one kind of position.

        Raises:
            StoreDamaged: The grids of the items are not those that their tokens have.
        """
        import torch

        if self._rope_index is None:
            return None, None
        ids = torch.tensor([[*prompt.input_ids[:end], 0]], device=self.device)  # [1, end + 1]
        types = {name: [*values[:end], 0] for name, values in prompt.token_types.items()}
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        small = small_inputs(prompt.placeholders, self.device) | token_types(types, self.device)
        given |= {ROPE_NAMES.get(name, name): value for name, value in small.items()}
        takes = _parameters(self._rope_index)
        try:
            positions, _ = self._rope_index(**{name: value for name, value in given.items() if name in takes})
        except Exception as error:  # each family's rule fails in another way where grids and tokens differ
            if is_out_of_memory(error):
                raise
            names = some_of([one.name for one in prompt.placeholders])
            raise StoreDamaged(
                f"the model finds no positions for {names}: placeholder and grid do not belong together; the store was "
                "not written by qvsplit, or damaged"
            ) from error
        return positions[:, :, :end], int(positions[0, 0, end])


# ----------------------------------------------------------------------------------------------------- model inputs


def model_inputs(
    placeholders: Sequence[Placeholder],
    features: Sequence[Features],
    types: Mapping[str, Sequence[int]],
    device: torch.device,
) -> dict[str, Any]:
    """Give what a model's forward may take of a prompt beside its tokens; `features` are those of its last items."""
    items = placeholders[len(placeholders) - len(features) :]
    given = small_inputs(items, device) | token_types(types, device)
    return given | {"mm_encoder_outputs": encoder_outputs(items, features)}


def small_inputs(items: Sequence[Placeholder], device: torch.device) -> dict[str, torch.Tensor]:
    """Give grids, and the other small inputs that the processor made for these items: one row or more an item."""
    import torch

    rows: dict[str, list[torch.Tensor]] = {}
    for one in items:
        if one.grid_thw is not None:
            rows.setdefault(f"{one.kind}_grid_thw", []).append(torch.tensor([one.grid_thw]))
        for name, value in one.inputs.items():
            tensor = torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
            rows.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors).to(device) for name, tensors in rows.items()}


def token_types(types: Mapping[str, Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Give the processor's types of tokens, [1, n], by the names of the model's inputs."""
    import torch

    return {name: torch.tensor([list(values)], device=device) for name, values in types.items()}


def encoder_outputs(items: Sequence[Placeholder], features: Sequence[Features]) -> dict[str, Any]:
    """Give the features of these items by kind, in the form in which the model's own encoder gives them."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    by_kind: dict[str, list[Features]] = {}
    for one, its in zip(items, features, strict=True):
        by_kind.setdefault(one.kind, []).append(its)
    outputs = {}
    for kind, of_kind in by_kind.items():
        containers, tensors = of_kind[0].containers, [its.torch() for its in of_kind]
        fields = {name: _field([one[name] for one in tensors], containers.get(name, LIST)) for name in tensors[0]}
        output = BaseModelOutputWithPooling(pooler_output=fields[POOLER_OUTPUT])
        levels = [name for name in fields if name.startswith(DEEPSTACK_FEATURES)]
        if levels:
            levels.sort(key=lambda name: int(name.rpartition("_")[2]))
            output["deepstack_features"] = [fields[name] for name in levels]
        outputs[kind] = output
    return outputs


def _field(tensors: list[torch.Tensor], container: str) -> Any:
    """Put one field of all items together: one tensor, or a list or tuple with one an item."""
    import torch

    if container == "tensor":
        return torch.cat(tensors)
    return tuple(tensors) if container == "tuple" else tensors


def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)

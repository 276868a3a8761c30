"""What becomes of a language model's modules, and where each of its tensors goes.

On a CPU `Layout(model)` puts our modules, still empty, in the place of transformers' own; then `place` takes one tensor
after the other, as it is stored, and nothing is held twice. `Plain` leaves transformers' modules as they are. On a GPU
transformers places the tensors, and `join` replaces modules afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qvsplit.kernels.fused_decoder import (
    FusedAttention,
    FusedMLP,
    FusedNorm,
    JoinedLinear,
    JoinedMLP,
    is_fusable_attention,
    is_fusable_mlp,
    is_fusable_norm,
    joined,
    projections,
)
from qvsplit.kernels.packed_linear import PackedLinear, can_pack
from qvsplit.kernels.vocabulary import OutputLayer, StoredEmbedding

Take = Callable[[torch.Tensor, bool], None]  # a tensor as it is stored, and whether its memory will be used again


class Plain:
    """Places tensors as the parameters and buffers of transformers' own modules."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def place(self, name: str, stored: torch.Tensor, is_reused: bool) -> None:
        """Set a parameter or buffer, by its name in the model, in the dtype that it has there."""
        module, leaf = self._owner(name)
        before = getattr(module, leaf)
        tensor = _own(stored, before.dtype, is_reused)
        if isinstance(before, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        tensor._is_hf_initialized = True  # else transformers draws it by chance
        setattr(module, leaf, tensor)

    def finish(self) -> None:
        """Tie what is tied."""
        for target, source in _tied(self.model).items():
            module, leaf = self._owner(target)
            setattr(module, leaf, self.model.get_parameter(source))

    def _owner(self, name: str) -> tuple[Any, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf


class Layout(Plain):
    """Places tensors in our own modules, which take the place of transformers' that have no weights yet."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._takes: dict[str, Take] = {}
        self._scratch = _Scratch()
        self._take_vocabulary()
        times = Counter(map(id, _parameters(model).values()))
        tied = {name for both in _tied(model).items() for name in both}
        self._shared = {name for name, one in _parameters(model).items() if times[id(one)] > 1} | tied
        self._walk("", model)

    def place(self, name: str, stored: torch.Tensor, is_reused: bool) -> None:
        """Put a tensor where it belongs."""
        if name in self._takes:
            self._takes[name](stored, is_reused)
        else:
            super().place(name, stored, is_reused)

    def finish(self) -> None:
        """Tie what is tied and has not been put in place; let go of the memory that was used in between."""
        self.model.all_tied_weights_keys = {a: b for a, b in _tied(self.model).items() if a not in self._takes}
        super().finish()
        self._scratch.clear()
        self._takes.clear()

    # -------------------------------------------------------------------------------------------------- layers

    def _walk(self, path: str, parent: Any) -> None:
        """Replace what can be of the modules below `parent`, the largest first."""
        for name, child in [*parent.named_children()]:
            below = f"{path}.{name}" if path else name
            module = None if f"{below}.weight" in self._takes else self._replacement(below, child)
            if module is None:
                self._walk(below, child)
            else:
                _mark_initialised(module)
                setattr(parent, name, module)

    def _replacement(self, path: str, child: Any) -> nn.Module | None:
        """Give our module for one of transformers', and note where its tensors go; None where there is none."""
        layers = {name: one for name, one in child.named_modules(prefix=path) if type(one) is nn.Linear}
        if not all(can_pack(one.weight.dtype) and f"{name}.weight" not in self._shared for name, one in layers.items()):
            return None
        if type(child) is nn.Linear:
            linear = PackedLinear(child)
            self._packs(path, linear, child)
            return linear
        if is_fusable_mlp(child):
            mlp = FusedMLP(child)
            for part in ("gate_proj", "up_proj", "down_proj"):
                self._packs(f"{path}.{part}", getattr(mlp, part), getattr(child, part))
            return mlp
        if is_fusable_attention(child):
            qkv, output = JoinedLinear(projections(child)), PackedLinear(child.o_proj)
            for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
                self._joins(f"{path}.{part}", qkv, number, getattr(child, part))
            self._packs(f"{path}.o_proj", output, child.o_proj)
            return FusedAttention(child, qkv, output)
        return None

    def _packs(self, path: str, module: PackedLinear, linear: nn.Linear) -> None:
        dtype = linear.weight.dtype
        self._takes[f"{path}.weight"] = lambda stored, _: module.lay_out(self._scratch.cast(stored, dtype))

    def _joins(self, path: str, module: JoinedLinear, number: int, linear: nn.Linear) -> None:
        dtype = linear.weight.dtype
        self._takes[f"{path}.weight"] = lambda stored, reused: module.lay_out(number, _own(stored, dtype, reused))
        if linear.bias is not None:
            self._takes[f"{path}.bias"] = lambda stored, _: module.set_bias(number, stored)

    # ---------------------------------------------------------------------------------------------- vocabulary

    def _take_vocabulary(self) -> None:
        """Note what takes the embedding's rows and the output layer's, where these are ordinary ones."""
        model = self.model
        embedding: Any = model.get_input_embeddings()
        head: Any = getattr(model, "lm_head", None)
        if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or head.bias is not None:
            return
        path = next(name for name, module in model.named_modules() if module is embedding)
        tied = head.weight is embedding.weight or "lm_head.weight" in _tied(model)
        dtype = head.weight.dtype

        def take_embedding(stored: torch.Tensor, is_reused: bool) -> None:
            widens = torch.promote_types(stored.dtype, dtype) == dtype  # only that is exact
            rows = _own(stored, stored.dtype if widens else dtype, is_reused)
            if rows.dtype == dtype:
                super(Layout, self).place(f"{path}.weight", rows, False)
            else:
                self._put(path, StoredEmbedding(rows, dtype))
            if tied:
                self._put("lm_head", OutputLayer.beside_the_embedding(rows, dtype, self._scratch.cast))

        def take_head(stored: torch.Tensor, _: bool) -> None:
            if not tied:
                self._put("lm_head", OutputLayer.of(stored, dtype, self._scratch.cast))

        self._takes |= {f"{path}.weight": take_embedding, "lm_head.weight": take_head}

    def _put(self, path: str, module: nn.Module) -> None:
        owner, name = self._owner(path)
        _mark_initialised(module)
        setattr(owner, name, module)


def lay_out(model: Any) -> None:
    """Put our modules in the place of those of a model that has its weights on a CPU, one tensor after the other."""
    tensors = _parameters(model)
    empty = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=False) for one in tensors.values()
    }
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, empty[id(tensor)])
    layout = Layout(model)
    for name in [*tensors]:
        layout.place(name, tensors.pop(name).detach(), False)
    layout.finish()


def join(parent: Any) -> None:
    """Join products and fuse norms of a model that has its weights on a GPU, layer by layer."""
    for name, child in [*parent.named_children()]:
        module = child
        if is_fusable_mlp(child):
            module = JoinedMLP(child)
        elif is_fusable_attention(child):
            module = FusedAttention(child, joined(projections(child)), child.o_proj)
        elif is_fusable_norm(child):
            module = FusedNorm(child)
        setattr(parent, name, module)
        join(module)


class _Scratch:
    """Memory that tensors are cast into, used again for the next one of the same dtype."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, torch.Tensor] = {}

    def cast(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor in `dtype`: itself, or a copy that the next call writes over."""
        if stored.dtype == dtype:
            return stored
        if dtype not in self._memory or len(self._memory[dtype]) < stored.numel():
            self._memory.pop(dtype, None)  # before there is a larger one
            self._memory[dtype] = torch.empty(stored.numel(), dtype=dtype)
        return self._memory[dtype][: stored.numel()].view(stored.shape).copy_(stored)

    def clear(self) -> None:
        """Let go of it."""
        self._memory.clear()


def _own(stored: torch.Tensor, dtype: torch.dtype, is_reused: bool) -> torch.Tensor:
    """Give a tensor in `dtype`, in memory that nothing else writes to."""
    return stored.clone() if is_reused and stored.dtype == dtype else stored.to(dtype)


def _tied(model: Any) -> dict[str, str]:
    """Give what transformers says is tied: the names of parameters, and of those whose tensors they take."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return tied


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _mark_initialised(module: nn.Module) -> None:
    """Have transformers leave a module alone when it initialises what no checkpoint holds."""
    for one in [*module.modules(), *module.parameters()]:
        one._is_hf_initialized = True

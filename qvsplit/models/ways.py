"""Which model answers in which way: by what of its prompts can be shared, and by the layers of its decoder.

Nothing is guessed. A decoder that is not listed, or that has a layer or a setting under which a way has not been
tried, answers one question at a time from the whole prompt, and `note` says so. With the kernels "reference" every
model does: prompts, modules and attention are transformers' own, and so are the bits of all scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qvsplit.models.copied_prefix import CopiedPrefix
from qvsplit.models.shared_prefix import SharedPrefix
from qvsplit.models.whole_prompt import WholePrompt

if TYPE_CHECKING:
    from qvsplit.checkpoints import families
    from qvsplit.models.asking import Way
    from qvsplit.models.forward import Forward

SHARED, COPIED = "shared", "copied"

# the decoders that have been tried, by `model_type` of the text config
DECODERS: Mapping[str, str] = {
    "qwen2_vl_text": SHARED,
    "qwen2_5_vl_text": SHARED,
    "qwen3_vl_text": SHARED,
    "qwen3_vl_moe_text": SHARED,
    "qwen3_5_text": SHARED,
    "qwen3_5_moe_text": SHARED,
    "qwen4_exp_text": COPIED,
    "qwen2_5_omni_text": SHARED,
    "qwen3_omni_moe_text": SHARED,
    "glm4v_text": SHARED,
    "gemma3_text": SHARED,
    "llama": SHARED,
    "qwen2": SHARED,
    "qwen3": SHARED,
    "mistral": SHARED,
    "ministral3": SHARED,
    "lfm2": SHARED,
    "lfm3": SHARED,
    "glm4v_moe_text": SHARED,
    "glm_ocr_text": SHARED,
    "aria_text": SHARED,
    "cohere2": SHARED,
    "exaone4": SHARED,
    "paddleocr_vl_text": SHARED,
    "step3p5": SHARED,
    "deepseek_v3": COPIED,
    "gpt_oss": COPIED,
}

# the layers that a shared prefix knows; windows are counted in tokens, whatever their positions
SHARED_LAYERS = frozenset({"full_attention", "sliding_attention", "linear_attention", "conv"})

# frequencies that depend on how long the sequence is: a beginning alone has others than the whole prompt
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def way_of(
    forward: Forward, prefix: families.Prefix, stops: Callable[[], Sequence[int]], kernels: str = "fused"
) -> tuple[Way, str | None]:
    """Give the way in which a model answers, and one sentence about it where questions cannot share a prefix."""
    if kernels == "reference":
        return WholePrompt(forward, stops, plain=True), None
    reason = why_whole(forward.config, prefix)
    if reason is not None:
        return WholePrompt(forward, stops), f"{reason}; each question computes its whole prompt, one after the other"
    way = SharedPrefix if DECODERS[forward.config.model_type] == SHARED else CopiedPrefix
    return way(forward, stops, can_extend=prefix == "causal"), None


def why_whole(text_config: Any, prefix: families.Prefix) -> str | None:
    """Say why questions cannot share the beginning of their prompts; None if they can."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    decoder = text_config.model_type
    if prefix == "none":
        return "this model's images depend on the question, or nobody has tried whether they do"
    if decoder not in DECODERS:
        return f"prefixes of the decoder {decoder!r} have not been tried"
    if rope := LENGTH_DEPENDENT_ROPE & _rope_types(text_config):
        return f"this model's rotary frequencies ({min(rope)}) depend on the length of the prompt"
    layers = set(get_layer_types_and_kwargs(text_config)[0])
    if DECODERS[decoder] == SHARED and layers - SHARED_LAYERS:
        return f"prefixes of layers of {min(layers - SHARED_LAYERS)} have not been tried"
    return None


def _rope_types(text_config: Any) -> set[str]:
    """Give the kinds of rotary frequencies: one for all layers, or one for each type of layer."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    return {str(one.get("rope_type")) for one in (rope, *rope.values()) if isinstance(one, Mapping)}

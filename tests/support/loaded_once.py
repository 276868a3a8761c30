"""Halves of a checkpoint that stay loaded from one command to the next in this process, as nobody changes them.

A command that is run in the tests' process loads a tiny model in 0.1 s, hundreds of times. What is loaded is looked up
by the files' names, sizes and times of change and by how it is loaded; what has an adapter, or was cancelled, is loaded
anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

_loaded: dict[Any, Any] = {}


def keep_loaded(patch: pytest.MonkeyPatch) -> None:
    """Have commands take the language models and encoders that were loaded for earlier ones."""
    from qvsplit.models import encoder, language

    load_language, load_encoder = language.load, encoder.load_encoder

    def language_model(checkpoint: Any, *, device: Any, dtype: Any, on_load: Any, **more: Any) -> Any:
        key = _key(checkpoint, "language", str(device), str(dtype), *sorted(more.items()))
        if key not in _loaded:
            model = load_language(checkpoint, device=device, dtype=dtype, on_load=on_load, **more)
            return model if key is None else _loaded.setdefault(key, model)
        return _loaded[key]

    def vision_encoder(spec: Any, on_load: Any) -> Any:
        how = {name: value for name, value in vars(spec).items() if name != "checkpoint"}
        key = _key(spec.checkpoint, "encoder", repr(sorted(how.items())))
        if key not in _loaded or _loaded[key]._cancelled.is_set():
            made = load_encoder(spec, on_load)
            if key is None:
                return made
            _loaded[key] = made
        return _loaded[key]

    patch.setattr(language, "load", language_model)
    patch.setattr(encoder, "load_encoder", vision_encoder)


def _key(checkpoint: Any, *how: Any) -> Any:
    if getattr(checkpoint, "adapter", None) is not None:
        return None
    files = ((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.folder.iterdir())
    return checkpoint.folder, checkpoint.name, checkpoint.revision, tuple(sorted(files)), how

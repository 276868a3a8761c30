"""What does it cost to store fewer bits? `extract --store` in each dtype, on postcards that the demo model never saw.

    python -m bench.lossy [--images 120]

Of each: bytes on disk, the cosine of each token with what was computed (mean and worst), how many answers to held-out
questions are those of the float32 store, and how many are right. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

STORES = ("float32", "bfloat16", "float16", "int8")


def main() -> None:
    """Extract, ask and compare, one store after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = _compare(Path(folder), told.images)
    print(f"{'':10} {'bytes':>10} {'of float32':>10} {'cosine':>9} {'worst':>9} {'same answers':>14} {'right':>14}")
    for name, one in results.items():
        print(
            f"{name:10} {one['bytes']:10,} {one['bytes'] / results['float32']['bytes']:10.3f} {one['cosine']:9.6f} "
            f"{one['worst_cosine']:9.6f} {one['same']:6,} of {one['asked']:,} {one['right']:6,} of {one['asked']:,}"
        )
    print(json.dumps({"bench": "lossy", "machine": platform.machine(), "cores": os.cpu_count(), "results": results}))


def _compare(folder: Path, number: int) -> dict[str, dict[str, Any]]:
    from train_demo.evaluate import from_shards, held_out_cards, mark

    import qvsplit

    (folder / "cards").mkdir()
    cards = held_out_cards(number, folder / "cards")
    computed: dict[str, Any] = {}
    answers: list[str] = []
    results: dict[str, dict[str, Any]] = {}
    for name in STORES:
        out = folder / name
        qvsplit.extract_files([folder / "cards"], out=out, options=qvsplit.ExtractSettings(model="demo", store=name))
        store = qvsplit.open_store(out)
        stored = {row.path: store.features(row)["pooler_output"].astype(np.float64) for row in store}
        computed = computed or stored
        cosines = np.concatenate([_cosines(stored[path], computed[path]) for path in stored])
        marked = mark(cards, from_shards(qvsplit.load_session(store)))
        answers = answers or [one.answer for one in marked]
        results[name] = {
            "bytes": sum(file.stat().st_size for file in out.glob("*.parquet")),
            "cosine": float(cosines.mean()),
            "worst_cosine": float(cosines.min()),
            "asked": len(marked),
            "same": sum(one.answer == theirs for one, theirs in zip(marked, answers, strict=True)),
            "right": sum(one.exact for one in marked),
        }
    return results


def _cosines(mine: Any, theirs: Any) -> Any:
    """Of each token, [n_tokens]."""
    return (mine * theirs).sum(1) / (np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1))


if __name__ == "__main__":
    main()

"""Training of the demo checkpoint, from nothing, with a fixed seed.

    python -m train_demo OUT [--device cuda] [--scale 1.0]

First the tower alone learns to say what stands in each token's square and what the whole card shows (the drawing
knows), through heads that are thrown away afterwards; then both halves learn to answer, asked in few wordings; then in
many, while the learning rate falls. Postcards are drawn as they are needed, and none is seen twice. Writes the
checkpoint and `log.jsonl` (loss, exact answers on held-out postcards). The same command again goes on where a stopped
run was, to the same end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from train_demo import postcards, questions
from train_demo.model import (
    CELL,
    MAX_PIXELS,
    Packed,
    Packer,
    grid_of,
    language_forward,
    make_model,
    make_tokenizer,
    patches_of,
    save,
    vision_forward,
)
from train_demo.questions import Which

SEED = 20
CELL_KINDS = (*postcards.KINDS, *postcards.LIGHTS)
FILTERS = (
    Image.Resampling.BICUBIC, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
)  # fmt: skip


WARM_UP = 100  # steps


@dataclass(frozen=True)
class Stage:
    """One part of the training."""

    name: str
    steps: int
    pictures: int  # a step
    questions_each: int
    two: float  # share of the steps that ask about two pictures together
    wordings: Which
    rate: float  # learning rate
    cool_down: float  # share of the steps over which the rate falls to nothing
    found: float  # how much more a square with a thing in it weighs than an empty one
    counted: float  # weight of the number of things, summed over squares


STAGES = (
    Stage("tower", 1200, 48, 0, 0.0, "first", 1e-3, 0.3, 5.0, 0.0),
    Stage("both", 2300, 32, 6, 0.12, "first", 1e-3, 0.0, 5.0, 0.0),
    Stage("many wordings", 2000, 32, 6, 0.15, "train", 1e-3, 0.6, 1.0, 0.5),
    Stage("counting", 800, 32, 6, 0.25, "train", 7e-4, 0.9, 1.0, 2.0),
)


@dataclass
class Batch:
    """Postcards of one size, what the tower may learn of them, and questions about them."""

    images: torch.Tensor  # uint8 [pictures, height, width, 3]
    cell_kind: torch.Tensor  # int64 [pictures, tokens]: 0 nothing, else 1 + number in CELL_KINDS
    cell_colour: torch.Tensor  # int64 [pictures, tokens]: -100 nothing
    cell_third: torch.Tensor  # int64 [pictures, tokens]: -100 nothing
    whole: torch.Tensor  # int64 [pictures, 3]: place, time, weather
    packed: Packed | None
    grid: tuple[int, int]
    asked: list[list[questions.Question]]


class Postcards(torch.utils.data.IterableDataset[Batch]):  # type: ignore[misc]
    """Batches without end. `questions_each` 0 gives none; `two` is the share of batches with two cards together."""

    def __init__(
        self, name: str, size: int, tokenizer: Any, questions_each: int, two: float, wordings: Which, start: int = 0
    ) -> None:
        super().__init__()
        self.name, self.size, self.questions_each, self.two, self.wordings = name, size, questions_each, two, wordings
        self.start = start
        self.packer = Packer(tokenizer)

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in itertools.count(self.start + first, step):
            yield self.batch(f"{self.name} {number}")

    def batch(self, seed: str) -> Batch:
        """The batch of a seed."""
        rng = random.Random(seed)
        aspect = math.exp(rng.uniform(math.log(0.5), math.log(2.5)))
        area = rng.uniform(0.9, 3.0) * MAX_PIXELS  # of the picture as it would lie on disk
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        rows, columns = grid_of(width, height)
        scenes = [postcards.make_scene(f"{seed} {n}", aspect=aspect) for n in range(self.size)]
        images = torch.empty((self.size, rows * CELL, columns * CELL, 3), dtype=torch.uint8)
        for image, scene in zip(images, scenes, strict=True):
            image.copy_(_small(scene, columns * CELL, rows * CELL, rng))
        packed, asked = None, []
        if self.questions_each and rng.random() < self.two:
            pairs = list(zip(scenes[::2], scenes[1::2], strict=True))
            asked = [
                [questions.ask_two(*pair, rng, wordings=self.wordings) for _ in range(self.questions_each)]
                for pair in pairs
            ]
            packed = self.packer.pack(asked, 2, (rows, columns))
        elif self.questions_each:
            asked = [
                questions.some_questions(scene, self.questions_each, rng, wordings=self.wordings) for scene in scenes
            ]
            packed = self.packer.pack(asked, 1, (rows, columns))
        return Batch(images, *_targets(scenes, rows, columns), packed, (rows, columns), asked)


def _small(scene: postcards.Scene, width: int, height: int, rng: random.Random) -> torch.Tensor:
    """The postcard at the size the tower sees, drawn larger and reduced in one of the ways pictures are."""
    times = rng.choice((1.7, 2.0, 2.6))
    true_width = math.sqrt(width * height * scene.aspect)
    large = postcards.draw(scene, round(true_width * times), round(true_width / scene.aspect * times))
    small = large.resize((width, height), rng.choice(FILTERS))
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(height, width, 3).float()
    pixels = pixels * rng.uniform(0.92, 1.05) + rng.uniform(-6, 6)
    if rng.random() < 0.5:
        noise = torch.Generator().manual_seed(rng.getrandbits(40))
        pixels += torch.randn(pixels.shape, generator=noise) * rng.uniform(0, 5)
    return pixels.clamp(0, 255).to(torch.uint8)


def _targets(
    scenes: list[postcards.Scene], rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (len(scenes), rows * columns)
    kind = torch.zeros(shape, dtype=torch.long)
    colour, side = torch.full(shape, -100), torch.full(shape, -100)
    colours = list(postcards.COLOURS)
    for n, scene in enumerate(scenes):
        groups = [*scene.groups, *([lit] if (lit := scene.group(scene.light_kind)) else [])]
        for group in groups:
            for x, y in group.spots:
                cell = int(y * rows) * columns + int(x * columns)
                kind[n, cell] = 1 + CELL_KINDS.index(group.kind)
                side[n, cell] = postcards.THIRDS.index(postcards.third(x))
                if group.colour:
                    colour[n, cell] = colours.index(group.colour)
    whole = [
        [postcards.PLACES.index(s.place), postcards.TIMES.index(s.time), postcards.WEATHERS.index(s.weather)]
        for s in scenes
    ]
    return kind, colour, side, torch.tensor(whole)


class Heads(nn.Module):  # type: ignore[misc]
    """What the tower is asked directly; not part of the checkpoint."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, 1 + len(CELL_KINDS))
        self.colour = nn.Linear(width, len(postcards.COLOURS))
        self.side = nn.Linear(width, 3)
        self.place, self.time, self.weather = nn.Linear(width, 4), nn.Linear(width, 2), nn.Linear(width, 4)

    def forward(self, embeds: torch.Tensor, batch: Batch, *, found: float, counted: float) -> torch.Tensor:
        """The loss of embeddings [pictures, tokens, hidden_size]; for `found` and `counted` see `Stage`."""
        device = embeds.device
        cross = nn.functional.cross_entropy
        kinds, width = batch.cell_kind.to(device).flatten(), embeds.shape[-1]
        flat = embeds.reshape(-1, width)
        told = self.kind(flat)
        each = cross(told, kinds, reduction="none")
        worth = 1.0 + (found - 1.0) * (kinds > 0)
        loss = (each * worth).sum() / worth.sum()
        if counted:
            # a thing on the border of two squares is half in each: what the squares say must add up to one
            shape = (*embeds.shape[:2], 1 + len(CELL_KINDS))
            sums = told.softmax(-1).view(shape).sum(1)
            true = nn.functional.one_hot(kinds, shape[-1]).view(shape).sum(1).to(sums.dtype)
            loss = loss + counted * nn.functional.smooth_l1_loss(sums[:, 1:], true[:, 1:], beta=0.1) * len(CELL_KINDS)
        loss = loss + cross(self.colour(flat), batch.cell_colour.to(device).flatten())
        loss = loss + cross(self.side(flat), batch.cell_third.to(device).flatten())
        mean, whole = embeds.mean(1), batch.whole.to(device)
        for number, head in enumerate((self.place, self.time, self.weather)):
            loss = loss + 0.5 * cross(head(mean), whole[:, number])
        return loss


class Run:
    """Model, optimizer, clock and log of one training."""

    def __init__(self, out: Path, device: torch.device, workers: int, scale: float = 1.0) -> None:
        torch.manual_seed(SEED)
        self.out, self.device, self.workers, self.scale = out, device, workers, scale
        self.tokenizer = make_tokenizer()
        self.model = make_model(self.tokenizer).to(device).train()
        self.tower = self.model.model.visual
        self.heads = Heads(self.model.config.text_config.hidden_size).to(device)
        self.began = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.jsonl").open("a")

    def say(self, **what: Any) -> None:
        """One line of the log, here and in the file."""
        line = json.dumps({"seconds": round(time.monotonic() - self.began), **what})
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def batches(self, stage: Stage, start: int) -> Iterator[Batch]:
        """Training batches from number `start`, drawn in other processes."""
        cards = Postcards(
            stage.name, stage.pictures, self.tokenizer, stage.questions_each, stage.two, stage.wordings, start=start
        )
        loader = torch.utils.data.DataLoader(cards, batch_size=None, num_workers=self.workers, prefetch_factor=8)
        return iter(loader)

    def optimizer(self, rate: float, modules: list[nn.Module]) -> torch.optim.AdamW:
        """AdamW; weight decay on matrices alone."""
        tensors = list({id(p): p for module in modules for p in module.parameters()}.values())
        groups = [
            {"params": [p for p in tensors if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in tensors if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)

    def stage(self, stage: Stage, *, until: int | None = None) -> None:
        """One stage, warmed up over the first steps and cooled down over the last; stopped after step `until`."""
        last = stage.steps if until is None else until
        modules = [self.model, self.heads] if stage.questions_each else [self.tower, self.heads]
        optimizer = self.optimizer(stage.rate, modules)
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        done = self.restore(stage, optimizer)
        if done >= last:
            return
        batches = self.batches(stage, done)
        smooth: dict[str, float] = {}
        for step in range(done + 1, last + 1):
            share = min(1.0, step / WARM_UP, (stage.steps - step + 1) / max(1.0, stage.cool_down * stage.steps))
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * share
            losses = self.losses(next(batches), stage)
            optimizer.zero_grad(set_to_none=True)
            losses["all"].backward()
            nn.utils.clip_grad_norm_(tensors, 1.0)
            optimizer.step()
            for name, loss in losses.items():
                value = loss.item()
                smooth[name] = 0.97 * smooth.get(name, value) + 0.03 * value
            if step % 100 == 0 or step == last:
                self.say(stage=stage.name, step=step, **{name: round(value, 4) for name, value in smooth.items()})
            if stage.questions_each and (step % 500 == 0 or step == last):
                self.say(stage=stage.name, step=step, exact=self.exact(6))
                save(self.model, self.tokenizer, self.out / "checkpoint")
            if step % 100 == 0 or step == last:
                self.keep(stage, step, optimizer)

    def keep(self, stage: Stage, step: int, optimizer: torch.optim.AdamW) -> None:
        """Everything a later run needs to go on, in one file."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if name != "model.lm_head.weight"}
        save_file(tensors, self.out / "state.new", metadata=self._marks(stage) | {"step": str(step)})
        (self.out / "state.new").rename(self.out / "state.safetensors")

    def _marks(self, stage: Stage) -> dict[str, str]:
        """What a state belongs to."""
        return {"stage": stage.name, "scale": str(self.scale), "stages": str(STAGES)}

    def restore(self, stage: Stage, optimizer: torch.optim.AdamW) -> int:
        """Take up what `keep` wrote; gives the steps of this stage that are done."""
        file = self.out / "state.safetensors"
        if not file.exists():
            return 0
        with safe_open(file, framework="pt", device=str(self.device)) as stream:
            where = stream.metadata()
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
        order = [one.name for one in STAGES]
        if where["scale"] != str(self.scale) or where["stages"] != str(STAGES):
            raise SystemExit(f"{file} is of a training with other stages or another --scale; choose another OUT")
        if order.index(where["stage"]) > order.index(stage.name):
            return stage.steps

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        lost = self.model.load_state_dict(part("model."), strict=False)
        assert lost.missing_keys == ["lm_head.weight"], lost  # which is tied
        assert not lost.unexpected_keys, lost
        self.heads.load_state_dict(part("heads."))
        if where["stage"] != stage.name:
            return 0
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in part("optimizer.").items():
            number, field = name.split(".")
            state.setdefault(int(number), {})[field] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(where["step"])

    def losses(self, batch: Batch, stage: Stage) -> dict[str, torch.Tensor]:
        """`seen` of the tower, `answers` where something is asked, `all` to go down."""
        embeds = self.see(batch)
        seen = self.heads(embeds, batch, found=stage.found, counted=stage.counted)
        if batch.packed is None:
            return {"seen": seen, "all": seen}
        answers = self.answer_loss(batch.packed.to(self.device), embeds)
        return {"seen": seen, "answers": answers, "all": answers + 0.3 * seen}

    def see(self, batch: Batch) -> torch.Tensor:
        """Embeddings of a batch."""
        return vision_forward(self.tower, patches_of(batch.images.to(self.device)), batch.grid)

    def answer_loss(self, packed: Packed, embeds: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the answers' tokens. A long answer counts more than a short one, but not by its length."""
        logits, places = language_forward(self.model, packed, embeds)
        wanted, weight = packed.ids[places[:, 0], places[:, 1]], packed.weight[places[:, 0], places[:, 1]]
        each = nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
        return (each * weight).sum() / weight.sum()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def exact(self, batches: int) -> dict[str, float]:
        """Share of exact answers by kind of question, on held-out postcards and wordings.

        An answer is exact if each of its tokens is the likeliest one after those before it: just what greedy
        decoding gives.
        """
        right: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for two in (0.0, 1.0):
            cards = Postcards("held out", 32, self.tokenizer, 8, two, "held out")
            for number in range(batches if not two else max(1, batches // 3)):
                batch = cards.batch(f"held out {two} {number}")
                assert batch.packed is not None
                packed = batch.packed.to(self.device)
                logits, places = language_forward(self.model, packed, self.see(batch))
                missed = logits.argmax(-1) != packed.ids[places[:, 0], places[:, 1]]
                wrong = {
                    (int(sequence), int(packed.segment[sequence, place])) for sequence, place in places[missed].tolist()
                }
                for sequence, several in enumerate(batch.asked):
                    for question_number, question in enumerate(several, 1):
                        total[question.kind] += 1
                        right[question.kind] += (sequence, question_number) not in wrong
        shares = {kind: round(right[kind] / total[kind], 3) for kind in questions.KINDS_OF_QUESTION if total[kind]}
        return {"all": round(sum(right.values()) / sum(total.values()), 3), **shares}


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="this many times the usual steps")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes that draw")
    told = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run = Run(told.out, torch.device(told.device), max(1, told.workers), told.scale)
    run.say(
        parameters=sum(p.numel() for p in run.model.parameters()),
        torch=torch.__version__,
        device=told.device,
        seed=SEED,
        scale=told.scale,
    )
    for stage in STAGES:
        run.stage(replace(stage, steps=max(1, round(stage.steps * told.scale))))
    run.say(done=True)


if __name__ == "__main__":
    main()

"""Copies to and from a device: every bit arrives, and no buffer is used again before its copy is done."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qvsplit.models import copies as copies_module
from qvsplit.models.copies import Copies, CudaPort, copies_to
from qvsplit.models.preparing import Prepared
from tests.support.lazy_copies import LazyPort


def prepared(*tensors, **more) -> Prepared:
    return Prepared({f"t{number}": one for number, one in enumerate(tensors)} | more, 1, 4, ())


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


BATCH = [
    prepared(torch.arange(588 * 3, dtype=torch.uint8).view(3, 588), kept="a text"),
    prepared(random(5, 7, dtype=torch.bfloat16), torch.tensor([[1, 2, 3]]), random(3, 4).t(), torch.zeros(0, 3)),
]


def same(one: Prepared, other: Prepared) -> bool:
    return one.values.keys() == other.values.keys() and all(
        torch.equal(value, other.values[name]) if isinstance(value, torch.Tensor) else value == other.values[name]
        for name, value in one.values.items()
    )


def test_what_was_prepared_arrives_as_it_was_in_one_copy():
    port = LazyPort()
    copies = Copies(port)
    sent = copies.send(BATCH)
    arrived = copies.arrived(sent)
    assert all(same(one, other) for one, other in zip(arrived, BATCH, strict=True))
    assert port.heard == ["pinned 2560", "copy 2560", "compute after 1"]
    pointers = {one.values["t0"].untyped_storage().data_ptr() for one in arrived}
    assert pointers == {sent.memory.data_ptr()}


def test_a_second_batch_waits_until_the_first_has_left_its_buffer():
    copies = Copies(LazyPort())
    first, second = ([prepared(random(40, 30, seed=seed))] for seed in (1, 2))
    on_their_way = [copies.send(first), copies.send(second)]
    for sent, batch in zip(on_their_way, (first, second), strict=True):
        assert same(copies.arrived(sent)[0], batch[0])


def test_memory_is_pinned_for_the_largest_batch_alone():
    port = LazyPort()
    copies = Copies(port)
    for rows in (4, 16, 8):
        copies.arrived(copies.send([prepared(random(rows, 64))]))
    assert [line for line in port.heard if line.startswith("pinned")] == ["pinned 1024", "pinned 4096"]


def test_features_are_received_one_after_the_other_once_they_are_computed():
    port = LazyPort()
    copies = Copies(port)
    values = [random(4, 6), random(9, 6, dtype=torch.bfloat16), random(3, 6).t()]
    with copies.receiving(port.computed()) as received:
        got = [received(one) for one in values]
    assert all(torch.equal(one, other) for one, other in zip(got, values, strict=True))
    assert port.heard[:2] == ["computed", "copy after computed"]


def test_where_the_device_has_no_room_the_batch_stays_where_it_is():
    assert Copies(LazyPort(room=100)).send(BATCH) is None
    assert Copies(LazyPort()).send([Prepared({}, 1, 1, ())]) is None


def test_what_is_too_large_to_be_pinned_goes_the_usual_way(monkeypatch):
    monkeypatch.setattr(copies_module, "MAX_PINNED", 1024)
    port = LazyPort()
    copies = Copies(port)
    assert copies.send(BATCH) is None
    values = random(40, 30)
    with copies.receiving(port.computed()) as received:
        assert torch.equal(received(values), values)
    assert not any(line.startswith("pinned") for line in port.heard)
    assert copies.send([prepared(random(4, 64))]) is not None


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory\nCUDA kernel errors …")],
)
def test_where_no_memory_can_be_pinned_everything_goes_the_usual_way(error):
    def refused(size):
        raise error

    port = LazyPort()
    pinned, port.pinned = port.pinned, refused
    copies = Copies(port)
    values = random(40, 30)
    assert copies.send(BATCH) is None
    with copies.receiving(port.computed()) as received:
        assert torch.equal(received(values), values)
        port.pinned = pinned
        assert torch.equal(received(values), values)
    assert port.heard[-2:] == ["pinned 4800", "copy 4800"]
    assert all(same(one, other) for one, other in zip(copies.arrived(copies.send(BATCH)), BATCH, strict=True))


@pytest.mark.parametrize("name", ["empty", "pinned"])
def test_other_errors_are_raised(name):
    port = LazyPort()
    setattr(port, name, lambda size: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Copies(port).send(BATCH)


def test_other_errors_of_pinning_are_raised_to_who_receives():
    port = LazyPort()
    port.pinned = lambda size: 1 / 0
    with pytest.raises(ZeroDivisionError), Copies(port).receiving(port.computed()) as received:
        received(random(40, 30))


def test_the_memory_of_what_was_sent_is_kept_until_it_is_computed_with():
    """Else the device's allocator could give it away while the computing stream still reads it."""
    port = LazyPort()
    copies = Copies(port)
    sent = copies.send(BATCH)
    with pytest.raises(AssertionError, match="sent memory"):
        copies.arrived(replace(sent, memory=sent.memory.clone()))
    copies.arrived(sent)


def test_a_cpu_needs_none():
    assert copies_to(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_every_bit_arrives_while_the_device_computes():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    copies = Copies(CudaPort(device))
    copies.port.use()
    batches = [[prepared(random(2000, 588, seed=seed)), *BATCH] for seed in range(6)]
    busy = torch.randn(3000, 3000, device=device)
    got = []
    for batch in batches:
        sent = copies.send(batch)
        busy = (busy @ busy).clamp_(-1, 1)
        arrived = copies.arrived(sent)
        doubled = [one.values["t0"].float() * 2 for one in arrived]
        del sent, arrived
        with copies.receiving(copies.port.computed()) as received:
            got.append([received(one) for one in doubled])
    for batch, mine in zip(batches, got, strict=True):
        assert all(torch.equal(one.values["t0"].float() * 2, two) for one, two in zip(batch, mine, strict=True))

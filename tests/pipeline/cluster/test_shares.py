"""What of a cluster's CPUs and GPUs each worker takes: whatever there is, readers and encoders work at once."""

from __future__ import annotations

import itertools

import pytest

from qvsplit.errors import UsageError
from qvsplit.pipeline.cluster.connection import Cluster
from qvsplit.pipeline.cluster.shares import Shares, device_of, shares_of

ROUNDING = 1e-9


def cluster(nodes: int, cpus: float, gpus: float = 0) -> Cluster:
    """So many nodes, each of so many CPUs and GPUs."""
    return Cluster(nodes, nodes * cpus, nodes * gpus, cpus, 1 << 30)


@pytest.mark.parametrize(
    ("where", "encoders", "expected"),
    [
        (cluster(1, 2), 1, Shares(1.0, 1, 0.0, 2)),
        (cluster(1, 2), 2, Shares(1.0, 0.5, 0.0, 1)),
        (cluster(3, 2), 3, Shares(1.0, 1, 0.0, 2)),
        (cluster(3, 2), 1, Shares(1.0, 1, 0.0, 2)),
        (cluster(3, 2), 6, Shares(1.0, 0.5, 0.0, 1)),
        (cluster(1, 64), 1, Shares(1.0, 32, 0.0, 64)),
        (cluster(1, 64), 4, Shares(1.0, 8, 0.0, 16)),
        (cluster(1, 64), 5, Shares(1.0, 6, 0.0, 12)),
        (cluster(1, 1), 1, Shares(0.5, 0.5, 0.0, 1)),
        (cluster(1, 1), 3, Shares(0.5, 0.1666, 0.0, 1)),
        (cluster(3, 1), 3, Shares(0.5, 0.5, 0.0, 1)),
        (cluster(1, 3), 1, Shares(1.0, 1, 0.0, 3)),
    ],
)
def test_all_encoders_have_one_half_and_readers_the_other(where, encoders, expected):
    assert shares_of(where, encoders, gpus=False) == expected


@pytest.mark.parametrize(
    ("where", "reader"), [(cluster(1, 16, 8), 1.0), (cluster(2, 1, 1), 0.5), (cluster(4, 2, 4), 1.0)]
)
@pytest.mark.parametrize("encoders", [1, 8])
def test_an_encoder_on_a_gpu_leaves_the_cpus_to_readers(where, reader, encoders):
    assert shares_of(where, encoders, gpus=True) == Shares(reader, 0.0, 1.0, 1)


def test_gpus_that_are_not_asked_for_are_left_alone():
    assert shares_of(cluster(2, 8, 4), 2, gpus=False) == Shares(1.0, 4, 0.0, 8)


@pytest.mark.parametrize("nodes", [1, 2, 3, 7])
@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 5, 8, 63, 64, 128])
def test_readers_have_a_place_wherever_the_encoders_are(nodes, cpus):
    """Ray places each where there is room: a run without a reader would wait for ever."""
    for encoders in [*range(1, min(3 * nodes * cpus, 60) + 1), 150, 300]:
        shares = shares_of(cluster(nodes, cpus), encoders, gpus=False)
        free = [float(cpus)] * nodes
        for _ in range(encoders):  # as full as a node can be, before the next one has any
            place = next((one for one in range(nodes) if free[one] >= shares.encoder_cpus - ROUNDING), None)
            assert place is not None, (encoders, "there is no room for all encoders")
            free[place] -= shares.encoder_cpus
        assert max(free) >= shares.reader_cpus - ROUNDING, (encoders, shares, free)


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("cpus", [0.5, 1, 1.5, 2, 5, 64])
def test_shares_are_such_as_ray_takes(nodes, cpus):
    """Below 1 up to four decimals, from 1 on whole."""
    for encoders, gpus in itertools.product(range(1, 40), (False, True)):
        shares = shares_of(cluster(nodes, cpus, 1), encoders, gpus=gpus)
        for share in (shares.reader_cpus, shares.encoder_cpus, shares.encoder_gpus):
            assert share >= 0 and (share == int(share) if share >= 1 else round(share, 4) == share), shares
        assert shares.reader_cpus > 0
        assert shares.encoder_cpus + shares.encoder_gpus > 0
        assert type(shares.encoder_threads) is int and 1 <= shares.encoder_threads <= max(1, cpus)
        assert shares.reader_cpus <= cpus and shares.encoder_cpus <= cpus


# ------------------------------------------------------------------------------------------------------------- devices

WITHOUT_GPU = cluster(1, 2)
WITH_GPUS = cluster(2, 8, 2)


@pytest.mark.parametrize(
    ("asked", "where", "expected"),
    [
        (None, WITHOUT_GPU, "cpu"), (None, WITH_GPUS, "cuda"), ("cpu", WITH_GPUS, "cpu"), ("cpu", WITHOUT_GPU, "cpu"),
        ("cuda", WITH_GPUS, "cuda"),
    ],
)  # fmt: skip
def test_the_device_of_an_encoder(asked, where, expected):
    assert device_of(asked, where) == expected


@pytest.mark.parametrize("asked", ["cuda:0", "cuda:13", "cpu,cpu", "cuda,cuda", "cuda:0,cuda:1"])
@pytest.mark.parametrize("where", [WITHOUT_GPU, WITH_GPUS])
def test_a_device_that_ray_does_not_share_out(asked, where):
    with pytest.raises(UsageError, match=f"^`device` {asked}: .*give cpu or cuda, and `ray_encoders`$") as caught:
        device_of(asked, where)
    assert caught.value.exit_code == 2


def test_a_gpu_of_a_cluster_that_has_none():
    with pytest.raises(UsageError, match="^`device` cuda: the Ray cluster has no GPU; try `device=cpu`$"):
        device_of("cuda", WITHOUT_GPU)

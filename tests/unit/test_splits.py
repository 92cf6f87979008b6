"""Addressed randomness, stratified subsets and validation splits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from kdbench.data import splits, streams
from kdbench.errors import UserError


def labels_of(*sizes: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def counts(labels: torch.Tensor, indices: torch.Tensor) -> list[int]:
    return torch.bincount(labels[indices], minlength=int(labels.max()) + 1).tolist()


# --- streams


def test_generator_is_a_function_of_its_address():
    first = torch.rand(5, generator=streams.generator(3, "order", 7))
    torch.rand(100)
    assert torch.equal(first, torch.rand(5, generator=streams.generator(3, "order", 7)))


def test_neighbouring_addresses_have_their_own_numbers():
    addresses = [(s, name, i) for s in range(6) for name in ("order", "augmentation", "order/1") for i in range(40)]
    drawn = {tuple(torch.randint(1 << 62, (2,), generator=streams.generator(*a)).tolist()) for a in addresses}
    assert len(drawn) == len(addresses)
    assert streams.digest(1, "a", 11) != streams.digest(11, "a", 1)
    assert len({streams.words(2, *a).tobytes() for a in addresses}) == len(addresses)


def test_generator_seed_is_the_documented_one():
    seed = int.from_bytes(hashlib.sha256(b"kdbench/-2/order/5").digest()[:8], "little")
    assert streams.generator(-2, "order", 5).initial_seed() == seed


def test_streams_are_uncorrelated():
    """First numbers of 4,000 neighbouring addresses: uniform, and not related from one address to the next."""
    first = np.array([torch.rand(1, generator=streams.generator(0, "x", i)).item() for i in range(4000)])
    assert stats.kstest(first, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 4 / np.sqrt(len(first))
    words = np.array([streams.words(1, 0, "x", i)[0] for i in range(4000)]) / 2.0**64
    assert stats.kstest(words, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(words[1:], words[:-1])[0, 1]) < 4 / np.sqrt(len(words))
    assert abs(np.corrcoef(words, first)[0, 1]) < 4 / np.sqrt(len(words))


def test_words_are_philox_with_the_documented_key():
    """Philox 4x64-10 in plain integers (Salmon et al. 2011), first block: numpy counts from 1."""
    key = hashlib.sha256(b"kdbench/0/x/1").digest()[:16]
    k = [int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")]
    c = [1, 0, 0, 0]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b % 2**64, (a >> 64) ^ c[3] ^ k[1], a % 2**64]
        k = [(k[0] + 0x9E3779B97F4A7C15) % 2**64, (k[1] + 0xBB67AE8584CAA73B) % 2**64]
    assert streams.words(4, 0, "x", 1).tolist() == c
    assert streams.words(9, 0, "x", 1)[:4].tolist() == c


def test_permutation_is_one_and_changes_with_every_part_of_its_address():
    base = streams.permutation(1000, 0, "order", 0)
    assert base.dtype == torch.int64 and torch.equal(base.sort().values, torch.arange(1000))
    assert torch.equal(base, streams.permutation(1000, 0, "order", 0))
    others = [(1, "order", 0), (0, "teacher", 0), (0, "order", 1)]
    assert all((streams.permutation(1000, *other) == base).sum() < 10 for other in others)
    assert streams.permutation(0, 0, "order").tolist() == []


def test_permutations_are_uniform():
    seen = {}
    for epoch in range(6000):
        order = tuple(streams.permutation(4, 0, "order", epoch).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24 and stats.chisquare(list(seen.values())).pvalue > 1e-3


# --- subsets


def test_per_class_subset():
    labels = labels_of(30, 50, 40)
    chosen = splits.subset(labels, per_class=7, seed=0)
    assert chosen.dtype == torch.int64 and counts(labels, chosen) == [7, 7, 7]
    assert torch.equal(chosen, chosen.unique())
    larger = splits.subset(labels, per_class=20, seed=0)
    assert set(chosen.tolist()) < set(larger.tolist())
    assert not torch.equal(chosen, splits.subset(labels, per_class=7, seed=1))
    assert torch.equal(chosen, splits.subset(labels, per_class=7, seed=0))


def test_a_class_gives_the_images_with_its_smallest_words():
    labels = labels_of(30, 50, 40)[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    ranked = sorted(range(120), key=streams.words(120, 5, "subset").tolist().__getitem__)
    expected = [i for label in range(3) for i in [i for i in ranked if labels[i] == label][:7]]
    assert splits.subset(labels, per_class=7, seed=5).tolist() == sorted(expected)


def test_the_smallest_class_may_give_all_it_has():
    assert counts(labels_of(6, 4, 9), splits.subset(labels_of(6, 4, 9), per_class=4, seed=0)) == [4, 4, 4]


def test_labels_need_not_be_sorted():
    labels = labels_of(30, 50, 40)[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    assert counts(labels, splits.subset(labels, fraction=0.1, seed=0)) == [3, 5, 4]


@pytest.mark.parametrize(
    "sizes, fraction, expected",
    [
        ((100, 100, 100), 0.1, [10, 10, 10]),
        ((100,) * 10, 0.29, [29] * 10),  # 0.29 * 100 is 28.999… in binary
        ((100, 100), 0.0725, [8, 7]),  # 14.5 images, 14.499… in binary; halves go up
        ((10, 20, 70), 0.25, [3, 5, 17]),  # quotas 2.5, 5, 17.5 of 25: one image left, equal remainders, lower class
        ((3, 97), 0.01, [1, 1]),  # at least one per class, though 1 % is one image
        ((1, 2, 997), 0.5, [1, 1, 498]),  # quotas 0.5, 1, 498.5 of 500
        ((4, 6), 1.0, [4, 6]),
        ((4, 6), 1, [4, 6]),
    ],
)
def test_fraction_keeps_proportions_by_largest_remainder(sizes, fraction, expected):
    labels = labels_of(*sizes)
    chosen = splits.subset(labels, fraction=fraction, seed=5)
    assert counts(labels, chosen) == expected


@pytest.mark.parametrize("seed", range(20))
def test_proportions_are_hamiltons_method(seed):
    """In whole numbers: every class its quota's whole part, and one more for the largest rests, lower classes first."""
    sizes = np.random.default_rng(seed).integers(20, 200, size=7).tolist()
    total, n = sum(sizes) // 3 + seed, sum(sizes)
    rests = sorted(range(7), key=lambda c: (-(sizes[c] * total % n), c))
    missing = total - sum(size * total // n for size in sizes)
    expected = [size * total // n + (c in rests[:missing]) for c, size in enumerate(sizes)]
    held = splits.validation(labels_of(*sizes), size=total, seed=0)[1]
    assert counts(labels_of(*sizes), held) == expected


def test_a_class_of_two_gives_one_and_keeps_one():
    assert counts(labels_of(2, 40), splits.validation(labels_of(2, 40), size=30, seed=0)[1]) == [1, 29]


def test_every_image_is_chosen_equally_often():
    labels = labels_of(20, 30)
    times = torch.zeros(50)
    for seed in range(2000):
        times[splits.subset(labels, fraction=0.2, seed=seed)] += 1
    assert times.sum() == 2000 * 10
    # Chosen without replacement, counts vary less than chi-square expects: by the factor 0.8.
    assert 1e-3 < stats.chi2(48).sf(float(((times - 400) ** 2 / 400).sum()) / 0.8) < 1 - 1e-3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "either 'fraction' or 'per_class'"),
        ({"fraction": 0.1, "per_class": 1}, "exactly one"),
        ({"fraction": 0.0}, "'fraction' cannot be 0.0"),
        ({"fraction": 1.5}, "cannot be 1.5"),
        ({"fraction": float("nan")}, "cannot be nan"),
        ({"fraction": True}, "cannot be True"),
        ({"per_class": 0}, "'per_class' cannot be 0"),
        ({"per_class": 2.5}, "cannot be 2.5"),
        ({"per_class": 5}, "class 1 has 4 training images"),
    ],
)
def test_impossible_subsets(arguments, message):
    with pytest.raises(UserError, match=message):
        splits.subset(labels_of(6, 4, 9), seed=0, **arguments)


def test_no_images():
    with pytest.raises(UserError, match="no images"):
        splits.subset(torch.empty(0, dtype=torch.int64), fraction=0.5, seed=0)


# --- validation


@pytest.mark.parametrize(
    "size, expected",
    [(20, [2, 4, 14]), (0.1, [2, 4, 14]), (3, [1, 1, 1]), (197, [19, 39, 139]), (5, [1, 1, 3]), (0.025, [1, 1, 3])],
)
def test_validation_is_stratified_disjoint_and_complete(size, expected):
    labels = labels_of(20, 40, 140)
    train, held = splits.validation(labels, size=size, seed=0)
    assert counts(labels, held) == expected
    assert torch.equal(torch.cat((train, held)).sort().values, torch.arange(200))
    assert torch.equal(train, train.sort().values) and torch.equal(held, held.sort().values)
    assert torch.equal(held, splits.validation(labels, size=size, seed=0)[1])


def test_validation_changes_with_its_seed_and_is_not_the_subset():
    labels = labels_of(100, 100)
    first = splits.validation(labels, size=20, seed=0)[1]
    assert not torch.equal(first, splits.validation(labels, size=20, seed=1)[1])
    assert not torch.equal(first, splits.subset(labels, per_class=10, seed=0))


@pytest.mark.parametrize(
    "sizes, size, message",
    [
        ((5, 5), 1, "between 2 and 8"),
        ((5, 5), 9, "between 2 and 8"),
        ((5, 5), 0, "cannot be 0"),
        ((5, 5), -3, "cannot be -3"),
        ((5, 5), 1.0, "'size' cannot be 1.0"),
        ((5, 5), True, "cannot be True"),
        ((5, 5), 0.01, "between 2 and 8"),
        ((5, 1), 2, "class 1 has one image"),
        ((5, 5), "5", "cannot be '5'"),
    ],
)
def test_impossible_validation_splits(sizes, size, message):
    with pytest.raises(UserError, match=message):
        splits.validation(labels_of(*sizes), size=size, seed=0)

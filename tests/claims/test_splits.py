"""Items by digest: where they are, in which order and batches, does not matter; what they hold does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitwright.claims.splits import digest_of_weights, first_entry, item_digests, overlap, split_of, splits_of
from bitwright.errors import CertificateError


@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_split_is_the_same_in_any_order_and_in_any_batches(order: list[int], size: int) -> None:
    x = torch.arange(12.0).view(6, 2)
    parts = [(part, torch.zeros(len(part))) for part in x[torch.tensor(order)].split(size)]
    assert splits_of(parts, {}, first_entry)["test"] == split_of(item_digests(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_one_changed_element_changes_its_item_alone(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 3, 2, dtype=dtype)
    other = x.clone()
    other[2, 1, 0] = 1
    assert overlap(item_digests(x), item_digests(other)) == [0, 1, 2, 3]
    assert overlap(item_digests(other), item_digests(x)) == [0, 1, 3]


def test_type_and_shape_are_part_of_an_item() -> None:
    x = torch.zeros(1, 4)
    others = (x, x.view(1, 2, 2), x.double(), x.int())
    assert len({item_digests(other)[0] for other in others}) == 4


def test_items_of_dicts_and_of_empty_batches() -> None:
    one = {"ids": torch.tensor([[1, 2], [3, 4]]), "mask": torch.ones(2, 2), "scale": torch.tensor(2.0)}
    assert len(set(item_digests(one))) == 2
    assert item_digests(torch.zeros(0, 3)) == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}, r"first dimensions \[2, 3\]"),
        ("words", "no tensors, but str"),
    ],
)
def test_what_has_no_items_is_an_error(inputs: object, message: str) -> None:
    with pytest.raises(CertificateError, match=message):
        item_digests(inputs)


def test_an_item_seen_before_is_refused_by_its_number() -> None:
    x = torch.arange(20.0).view(10, 2)
    test = [(x[:5], torch.zeros(5)), (x[5:], torch.zeros(5))]
    new = x + 100
    found = splits_of(test, {"calibration": [new], "search": [(new[:3], torch.zeros(3))]}, first_entry)
    assert {name: split.items for name, split in found.items()} == {"test": 10, "calibration": 10, "search": 3}
    with pytest.raises(CertificateError, match=r"2 of 10 test items are in 'calibration' too \(numbers 6, 9\)"):
        splits_of(test, {"calibration": [torch.stack([x[9], x[6]])]}, first_entry)


def test_what_cannot_be_compared_is_refused_and_not_passed_over() -> None:
    x = torch.zeros(4, 2)
    test = [((x, x), torch.zeros(4))]
    assert splits_of(test, {"calibration": [(x + 1, x)]}, first_entry)["calibration"].items == 4
    with pytest.raises(CertificateError, match="cannot be compared with 'calibration'"):
        splits_of(test, {"calibration": [x]}, first_entry)
    with pytest.raises(CertificateError, match="name the splits seen before otherwise"):
        splits_of(test, {"test": [x]}, first_entry)
    with pytest.raises(CertificateError, match="no batches"):
        splits_of([], {}, first_entry)


def test_repeated_items_are_counted() -> None:
    assert split_of(item_digests(torch.zeros(3, 2))).repeated == 2


def test_digest_of_weights_sees_names_and_bits() -> None:
    net = nn.Linear(3, 2)
    first = digest_of_weights(net)
    assert first == digest_of_weights(net)
    with torch.no_grad():
        net.weight[1, 2] = torch.nextafter(net.weight[1, 2], torch.tensor(9.0))
    assert digest_of_weights(net) != first
    assert digest_of_weights(nn.Sequential(net)) != digest_of_weights(net)

"""Which items a split of the data holds, told by digests: that no item of the test was seen before can be checked.

The digest of an item is SHA-256 over what the model sees of it, bit by bit. It finds the same item in another place or
another order, not a copy that was augmented or encoded anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.errors import CertificateError

TEST = "test"
Inputs = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Split:
    """How many items a split holds, how many of them repeat an earlier one, and the digest of all in any order."""

    items: int
    repeated: int
    digest: str


def first_entry(batch: Any) -> Any:
    """What the model sees of a batch: the first entry of a tuple or list such as (inputs, target), else all of it.

    >>> first_entry((1, 2)), first_entry({"x": 1})
    (1, {'x': 1})
    """
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def item_digests(inputs: Any) -> list[bytes]:
    """One digest per item of a batch of model inputs; items lie along the first dimension of its tensors.

    Raises `CertificateError` for a batch without tensors, or whose tensors have different first dimensions.

    >>> one, other = item_digests(torch.zeros(2, 3))
    >>> one == other == item_digests({"x": torch.zeros(1, 3)})[0]
    True
    """
    tensors = _tensors(inputs)
    counts = sorted({len(tensor) for tensor in tensors})
    if len(counts) != 1:
        found = f"first dimensions {counts}" if counts else f"no tensors, but {type(inputs).__name__}"
        raise CertificateError(
            f"items are told apart by the first dimension of a batch's inputs, found {found}; pass inputs=function "
            "from a batch to what the model sees of it"
        )
    if not counts[0]:
        return []
    heads = [f"{tensor.dtype}{list(tensor.shape[1:])}".encode() for tensor in tensors]
    rows = [tensor.detach().cpu().contiguous().reshape(counts[0], -1).view(torch.uint8).numpy() for tensor in tensors]
    return [
        hashlib.sha256(b"".join(head + row[i].tobytes() for head, row in zip(heads, rows, strict=True))).digest()
        for i in range(counts[0])
    ]


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]


def _form(inputs: Any) -> str:
    """Types and dimensions of the tensors of a batch: items of another form have other digests."""
    return ", ".join(f"{str(tensor.dtype)[6:]} of {tensor.dim()} dimensions" for tensor in _tensors(inputs))


def split_of(digests: Sequence[bytes]) -> Split:
    """The split that holds these items."""
    whole = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    return Split(len(digests), len(digests) - len(set(digests)), whole)


def splits_of(test: Sequence[Any], seen: Mapping[str, Iterable[Any]], inputs: Inputs) -> dict[str, Split]:
    """The test split and all those that were seen before, by name.

    Batches of the latter have the form of the test's, or hold bare inputs. Raises `CertificateError` when an item of
    the test is in one of the others, when what the model sees of them cannot be compared, and when a split is named
    ``test``.
    """
    if TEST in seen:
        raise CertificateError(f"{TEST!r} is the split that the scores are from; name the splits seen before otherwise")
    if not test:
        raise CertificateError("the test got no batches; a drop on nothing does not exist")
    tested = [digest for batch in test for digest in item_digests(inputs(batch))]
    form, found = _form(inputs(test[0])), {TEST: split_of(tested)}
    for name, batches in seen.items():
        digests = [digest for batch in batches for digest in item_digests(_seen(batch, name, form, inputs))]
        common = overlap(tested, digests)
        if common:
            numbers = ", ".join(map(str, common[:5])) + (", ..." if len(common) > 5 else "")
            raise CertificateError(
                f"{len(common):,} of {len(tested):,} test items are in {name!r} too (numbers {numbers}); a certificate "
                "needs items that no step before has seen: leave these out of the test"
            )
        found[name] = split_of(digests)
    return found


def _seen(batch: Any, name: str, form: str, inputs: Inputs) -> Any:
    """What the model sees of a batch of another split, in the form that it sees of the test's."""
    for candidate in (inputs(batch), batch):
        if _form(candidate) == form:
            return candidate
    raise CertificateError(
        f"what the model sees of a test item ({form}) cannot be compared with {name!r} ({_form(inputs(batch))}); pass "
        "inputs=function from a batch of either to what the model sees of it"
    )


def overlap(tested: Sequence[bytes], others: Iterable[bytes]) -> list[int]:
    """Numbers of the test items that are among the others.

    >>> overlap([b"a", b"b", b"c"], [b"c", b"d"])
    [2]
    """
    known = set(others)
    return [number for number, digest in enumerate(tested) if digest in known]


def digest_of_weights(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bits of all that a model's file holds.

    >>> digest_of_weights(nn.Identity())[:8]
    'e3b0c442'
    """
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        content = value.detach().cpu().contiguous()
        whole.update(f"{name} {content.dtype} {list(content.shape)}\n".encode())
        if content.numel():
            whole.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()

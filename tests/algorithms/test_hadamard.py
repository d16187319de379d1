"""Orthogonal matrices of every width; flat ones where a construction is known."""

from __future__ import annotations

import pytest
import torch

from bitwright.algorithms.hadamard import _PRIMES, orthogonal, paley


@pytest.mark.parametrize("width", [1, 2, 12, 20, 28, 44, 60, 64, 96, 172, 288, 384, 640, 768])
def test_orthogonal(width: int) -> None:
    for generator in (None, torch.Generator().manual_seed(1)):
        matrix = orthogonal(width, generator)
        assert (matrix @ matrix.T - torch.eye(width, dtype=torch.double)).abs().max() < 1e-13
        if width not in (28, 172, 288):
            assert torch.allclose(matrix.abs(), torch.full_like(matrix, width**-0.5))


def test_random_signs_differ_by_seed() -> None:
    one, other = (orthogonal(64, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(one, other)
    assert torch.equal(one, orthogonal(64, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("prime", _PRIMES)
def test_paley(prime: int) -> None:
    matrix = paley(prime) * (prime + 1) ** 0.5
    assert set(matrix.unique().round(decimals=9).tolist()) == {-1.0, 1.0}
    assert (matrix @ matrix.T - (prime + 1) * torch.eye(prime + 1, dtype=torch.double)).abs().max() < 1e-9

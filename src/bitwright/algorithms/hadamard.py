"""Orthogonal matrices that spread one large channel over all: Hadamard matrices of any width."""

from __future__ import annotations

import torch
from torch import Tensor

_PRIMES = (3, 7, 11, 19, 23, 31, 43, 47, 59, 67, 71, 79, 83, 103, 107, 127)
"""Primes q with q % 4 = 3: Paley's first construction gives a Hadamard matrix of size q + 1."""


def orthogonal(width: int, generator: torch.Generator | None = None) -> Tensor:
    """An orthogonal ``[width, width]`` matrix in float64, with random signs per row when there is a ``generator``.

    ``Sylvester(2^m) x block``, where the block is 1 wide or a Hadamard matrix of Paley, which makes all entries
    ``+-1/sqrt(width)``; for other widths a random orthogonal block of the odd part (seed 0 without a ``generator``).

    >>> matrix = orthogonal(384)
    >>> bool(torch.allclose(matrix @ matrix.T, torch.eye(384, dtype=torch.double))), matrix.abs().unique().numel()
    (True, 1)
    """
    block = _block(width, generator)
    matrix = torch.kron(sylvester(width // len(block)), block)
    if generator is not None:
        matrix = matrix * (torch.randint(0, 2, (width, 1), generator=generator) * 2.0 - 1.0)
    return matrix


def sylvester(size: int) -> Tensor:
    """The Hadamard matrix of a power of two, scaled to be orthogonal, ``[size, size]``.

    >>> sylvester(2) * 2**0.5
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    """
    matrix = torch.ones(1, 1, dtype=torch.double)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def paley(prime: int) -> Tensor:
    """The orthogonal Hadamard matrix of size ``prime + 1`` for a prime that leaves 3 when divided by 4.

    ``H = I + S`` where S borders the Jacobsthal matrix ``Q[i, j] = legendre(i - j)`` with ones (Paley 1933).

    >>> bool(torch.allclose(paley(11) @ paley(11).T, torch.eye(12, dtype=torch.double)))
    True
    """
    legendre = -torch.ones(prime, dtype=torch.double)
    legendre[torch.arange(1, prime).square() % prime] = 1.0
    legendre[0] = 0.0
    at = torch.arange(prime)
    skew = torch.ones(prime + 1, prime + 1, dtype=torch.double)
    skew[1:, 1:] = legendre[(at.unsqueeze(1) - at) % prime]
    skew[1:, 0], skew[0, 0] = -1.0, 0.0
    return (skew + torch.eye(prime + 1, dtype=torch.double)) / (prime + 1) ** 0.5


def _block(width: int, generator: torch.Generator | None) -> Tensor:
    odd = width // (width & -width)
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.double)
    for prime in _PRIMES:
        size = prime + 1
        if width % size == 0 and (width // size) & (width // size - 1) == 0:
            return paley(prime)
    generator = generator or torch.Generator().manual_seed(0)
    basis, triangle = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.double, generator=generator))
    return (basis * triangle.diagonal().sign()).contiguous()

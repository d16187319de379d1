"""The development data beside the checkout, read into tensors. Nothing here is part of the package."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import CheckpointError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def shared(name: str) -> Path:
    """Path of a data set; raises with a clear message where the development data is absent."""
    path = SHARED / name
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: this benchmark needs the development data beside the checkout")
    return path


def jpeg_cifar10(split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised images ``[n, 3, 32, 32]`` and labels ``[n]`` of the JPEG CIFAR-10 ``train`` or ``test`` split."""
    from PIL import Image

    data = np.load(shared("cifar10_jpeg") / f"{split}.npz")
    raw, offset, labels = data["data"], data["offset"], data["y"]
    count = len(labels) if limit is None else limit
    images = [np.asarray(Image.open(io.BytesIO(raw[offset[i] : offset[i + 1]].tobytes()))) for i in range(count)]
    return normalised(np.stack(images)), torch.from_numpy(labels[:count].astype(np.int64))


def normalised(images: np.ndarray) -> Tensor:
    """uint8 ``[n, h, w, 3]`` to float ``[n, 3, h, w]`` with the statistics the ResNets were trained with."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD

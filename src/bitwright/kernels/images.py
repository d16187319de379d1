"""Images that stay bytes between layers: encoded once, multiplied, added, and left as the bytes that come next.

Bytes are ``[n, h, w, channels rounded up to 4]``: code, plus 128 where codes are signed. What is computed equals
``bitwright::conv2d`` and ``bitwright::add`` followed by the consumer's encoding, bit for bit: encoding is monotone,
so bounds (ReLU, ReLU6) may be put into it. Nothing here is registered with torch: these calls stand for what `lowbit`
decides at run time, outside of compiled graphs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitwright.errors import KernelError
from bitwright.kernels import cpu
from bitwright.kernels.reference import Geometry
from bitwright.kernels.row import Activation, Packed
from bitwright.kernels.unpack import product_bits
from bitwright.numerics.spec import QuantSpec


class Encoding(NamedTuple):
    """The numbers of a static quantizer with one scale: what an image of bytes means."""

    scale: float
    zero: float
    qmin: int
    qmax: int


class Request(NamedTuple):
    """What a consumer asks a producer for: its result clamped to [low, high], in an encoding or (None) as float32."""

    encoding: Encoding | None
    low: float
    high: float


class Window(NamedTuple):
    """The geometry of a pooling, (height, width) each."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


def encoding_of(input: Activation | None) -> Encoding | None:
    """The encoding of a layer's input; None where it is not static with one scale and at most 8 bits.

    >>> from bitwright.numerics.spec import QParams, QuantSpec
    >>> encoding_of(Activation(QuantSpec.parse("uint8/asym"), QParams(torch.tensor([0.5]), torch.tensor([3.0]))))
    Encoding(scale=0.5, zero=3.0, qmin=0, qmax=255)
    """
    if input is None or input.qparams is None or input.qparams.scale.numel() != 1:
        return None
    fmt, zero_point = input.spec.format, input.qparams.zero_point
    if not fmt.is_integer or fmt.bits > 8:
        return None
    return Encoding(input.qparams.scale.item(), 0.0 if zero_point is None else zero_point.item(), fmt.qmin, fmt.qmax)


def encode(x: Tensor, request: Request) -> Tensor:
    """The bytes of float32 images ``[n, c, h, w]`` in the encoding of a request."""
    n, c, h, w = x.shape
    x = x if 1 in (x.stride(1), x.stride(3)) else x.contiguous()
    out = _image(n, h, w, c)
    cpu.native.encode_images(
        cpu.BEST_ISA, x.data_ptr(), n, c, h, w, *x.stride(), _bytes(out, request), torch.get_num_threads()
    )
    return out


class Filters(NamedTuple):
    """What `convolve` needs of a layer: numbers in the order of the native call, and constants."""

    numbers: tuple[float, ...]
    parts: tuple[Tensor | None, ...]


def filters_of(packed: Packed, weight: QuantSpec, bias: Tensor | None, encoding: Encoding, g: Geometry) -> Filters:
    """A layer's constants, gathered once."""
    shape = (packed.scale.numel(), *g.kernel_size, *g.stride, *g.padding, *g.dilation, g.groups)
    return Filters((*shape, product_bits(weight), *encoding), (packed.layout, packed.scale, packed.sums, bias))


def convolve(
    isa: int, filters: Filters, images: Tensor, shape: tuple[int, ...], sizes: tuple[int, ...], request: Request
) -> Tensor:
    """A convolution of bytes that stand for ``shape`` ``[n, c, h, w]``: bytes as requested, or float32 ``sizes``."""
    (n, c, h, w), pixel = shape, images.shape[3]
    out = _result(sizes, request)
    places = [0 if part is None else part.data_ptr() for part in filters.parts]
    try:
        cpu.native.conv2d(
            isa, 0, n, c, h, w, h * w * pixel, 1, w * pixel, pixel, *filters.numbers, *places,
            0 if request.encoding else out.data_ptr(), torch.get_num_threads(), images.data_ptr(), _bytes(out, request),
        )  # fmt: skip
    except ValueError as error:
        raise KernelError(f"conv2d: {error}") from error
    return out if request.encoding else _bounded(out, request)


def add(a: Tensor, b: Tensor, shape: tuple[int, ...], left: Encoding, right: Encoding, request: Request) -> Tensor:
    """The sum of two images of bytes that stand for ``shape``: bytes as requested, or float32."""
    n, c, h, w = shape
    padded = (n, a.shape[3], h, w)
    out = _result(padded, request)
    cpu.native.add_images(
        cpu.BEST_ISA, a.data_ptr(), _meaning(left), b.data_ptr(), _meaning(right), out.numel(),
        0 if request.encoding else out.data_ptr(), _bytes(out, request), torch.get_num_threads(),
    )  # fmt: skip
    return out if request.encoding else _bounded(out if out.shape[1] == c else out[:, :c].clone(), request)


def max_pool(images: Tensor, window: Window) -> Tensor:
    """The largest byte of every window: the bytes of max-pooled images, as larger values have no smaller bytes."""
    n, h, w, pixel = images.shape
    ho, wo = pooled_size((h, w), window)
    out = torch.empty((n, ho, wo, pixel), dtype=torch.uint8)
    cpu.native.max_pool(
        images.data_ptr(), n, h, w, pixel, *window.kernel_size, *window.stride, *window.padding, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def pooled_size(size: tuple[int, int], window: Window) -> tuple[int, int]:
    """Height and width of pooled images.

    >>> pooled_size((112, 112), Window((3, 3), (2, 2), (1, 1)))
    (56, 56)
    """
    height, width = (
        (length + 2 * pad - kernel) // stride + 1
        for length, kernel, stride, pad in zip(size, window.kernel_size, window.stride, window.padding, strict=True)
    )
    return height, width


def _result(sizes: tuple[int, ...], request: Request) -> Tensor:
    n, c, h, w = sizes
    if request.encoding is not None:
        return _image(n, h, w, c)
    return torch.empty(sizes, dtype=torch.float32, memory_format=torch.channels_last)


def _bounded(y: Tensor, request: Request) -> Tensor:
    return y if request.low == -torch.inf and request.high == torch.inf else y.clamp_(request.low, request.high)


def _image(n: int, h: int, w: int, channels: int) -> Tensor:
    return torch.empty((n, h, w, channels + -channels % 4), dtype=torch.uint8)


def _bytes(out: Tensor, request: Request) -> object:
    if request.encoding is None:
        return cpu.native.Bytes.none()
    return cpu.native.Bytes.of(out.data_ptr(), *request.encoding, request.low, request.high)


def _meaning(encoding: Encoding) -> object:
    return cpu.native.Bytes.of(0, *encoding, -torch.inf, torch.inf)

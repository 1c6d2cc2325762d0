"""Where a convolution's taps lie at several dilations, and splits of tensors that keep gradients whole."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..base.errors import GenotypeError
from ..genotype.runs import Dilation

# ONNX Runtime can not load a Split whose sizes the exporter put into the file beside the model, as it does with more.
MAX_SPLIT = 32


class Geometry(NamedTuple):
    """Where a plain convolution's taps lie, by axis (height, width), and where they lie at another dilation.

    >>> Geometry((3, 3), (1, 1), (1, 1), (1, 1)).padding_at((1, 3))
    (1, 3)
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def padding_at(self, dilation: Dilation, name: str = "convolution") -> tuple[int, int]:
        """Find what keeps output size and tap centre; GenotypeError, naming the convolution, where no padding does."""
        rows, columns = (
            p + halved((d - 1) * d0 * (k - 1), name)
            for p, d, d0, k in zip(self.padding, dilation, self.dilation, self.kernel_size, strict=True)
        )
        return rows, columns

    def dilation_at(self, dilation: Dilation) -> tuple[int, int]:
        """Multiply the convolution's own dilation with a run's."""
        return dilation[0] * self.dilation[0], dilation[1] * self.dilation[1]

    def centres_rows(self) -> bool:
        """Tell whether the kernel's central row reads, for output row i, input row stride * i, and reads them all."""
        return 2 * self.padding[0] == (self.kernel_size[0] - 1) * self.dilation[0]


def split_channels(tensor: Tensor, sizes: list[int], dim: int = 1, most: int = MAX_SPLIT) -> list[Tensor]:
    """Cut a tensor into views of `sizes` along `dim`.

    >>> [part.shape[1] for part in split_channels(torch.zeros(1, 5, 2, 2), [2, 3])]
    [2, 3]
    """
    # Splits and no slices: a split's backward is one concatenation, that of n slices is n zero-filled tensors. Its
    # result is indexed and not iterated over, which fx could not trace. Concatenating, unlike an index_select,
    # keeps the images channels_last.
    blocks = [tensor]
    if len(sizes) > most:
        totals = [sum(sizes[i : i + most]) for i in range(0, len(sizes), most)]
        outer = tensor.split(totals, dim)
        blocks = [outer[i] for i in range(len(totals))]
    parts: list[Tensor] = []
    for i, block in enumerate(blocks):
        own = sizes[i * most : (i + 1) * most]
        inner = block.split(own, dim)
        parts.extend([inner[j] for j in range(len(own))])
    return parts


def halved(total: int, name: str) -> int:
    """Halve what a padding grows by; GenotypeError, naming the convolution, where it is odd.

    >>> halved(4, "conv1")
    2
    """
    if total % 2:
        raise GenotypeError(f"{name}: its padding would have to grow by {total}/2 on each side, no whole number")
    return total // 2


def argsort(values: Sequence[int]) -> list[int]:
    """List the indices that sort the values; of a permutation of 0..n-1, where each of them stands.

    >>> argsort([2, 0, 1])
    [1, 2, 0]
    """
    return sorted(range(len(values)), key=values.__getitem__)

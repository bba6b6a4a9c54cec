"""What merged weights should be, computed in float64 from base and adapter, by other code than the engine's."""

from collections.abc import Iterator

import torch

from exporter.adapter import Adapter
from exporter.blocks import column_norms, matrices_in, own_base
from exporter.byte_source import ByteReader
from exporter.pairs import AddedBias, LoraPair, matrices_of
from exporter.plan import OutputFile, OutputTensor
from exporter.tensors import read_elements, read_tensor

SAMPLED_ROWS = 2
FLOAT32_EPS = 2.0**-24


def exact_rows(
    file: OutputFile, output: OutputTensor, adapter: Adapter, source: ByteReader
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Rows of what a merged tensor should be: the flat index each begins with, float64 values, their bound of error.

    The bound is half an ulp for the one rounding, plus this slack: the float32 error of a dot product of length rank
    and, with DoRA, of the norm (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.5).
    """
    change, tensor = output.change, output.source
    count, rows, width = matrices_in(output.tensor)
    if isinstance(change, AddedBias):
        before = read_elements(file.source, tensor, 0, rows).double()
        added = change.scale * read_tensor(adapter.file, change.tensor).double()
        yield 0, before + added, 3 * FLOAT32_EPS * (before.abs() + added.abs())
        return
    assert isinstance(change, LoraPair)  # noqa: S101  # the type checker's sake
    sampled = sorted({count * rows * i // SAMPLED_ROWS for i in range(SAMPLED_ROWS)})
    for number, pair in enumerate(matrices_of(change, adapter.file, output.tensor.shape)):
        norms = None
        if pair.columns is not None:
            norms = column_norms(output, pair, change, adapter, source).double()
        for row in (place - number * rows for place in sampled if place // rows == number):
            first = (number * rows + row) * width
            own = own_base(change, adapter, row, 1, width)
            weight = read_elements(file.source, tensor, first, width) if own is None else own[0]
            before, added = weight.double(), pair.scale * (pair.b[row].double() @ pair.a.double())
            size = before.abs() + abs(pair.scale) * (pair.b[row].double().abs() @ pair.a.double().abs())
            exact, slack = before + added, (change.rank + 3) * FLOAT32_EPS * size
            if pair.rows is not None:
                norm = torch.linalg.vector_norm(exact)
                factor = pair.rows[row].double() / norm
                of_norm = (width + 8) * FLOAT32_EPS + torch.linalg.vector_norm(slack) / norm
                exact, slack = exact * factor, slack * factor.abs() + (exact * factor).abs() * of_norm
            if norms is not None and pair.columns is not None:
                factors = pair.columns.double() / norms
                exact, slack = exact * factors, (slack + (change.rank + 8) * FLOAT32_EPS * size) * factors.abs()
            yield first, exact, slack

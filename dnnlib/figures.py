# SPDX-License-Identifier: Apache-2.0
"""Figures by matplotlib, which is imported only when one is drawn, without a display."""

import contextlib
import os
from collections.abc import Iterator

from dnnlib.files import replacing
from dnnlib.util import UserError


@contextlib.contextmanager
def figure(path: str | os.PathLike, who: str, rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple]:
    """(figure, axes [rows, columns]) to draw on; saved to `path` as a PNG when the block ends without an error.

    who: what needs matplotlib, for the error if it is missing. size: (width, height) in inches."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f'{who} needs the package matplotlib: pip install matplotlib') from None
    matplotlib.use('agg')
    from matplotlib import pyplot

    made, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained')
    try:
        yield made, axes
        with replacing(path) as part:
            made.savefig(part, format='png', dpi=110)
    finally:
        pyplot.close(made)

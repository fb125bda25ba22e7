# SPDX-License-Identifier: Apache-2.0
"""Pictures of curves: matplotlib, which is loaded only for them, without a display."""

import contextlib

from dnnlib.files import replacing
from dnnlib.util import UserError


@contextlib.contextmanager
def figure(path, who, rows, columns, size):
    """(figure, axes [rows, columns]) to draw on; written to `path` as a PNG when the block ends well.

    who: what needs matplotlib, in the error where it is not there. size: (width, height) in inches."""
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

# SPDX-License-Identifier: Apache-2.0
"""Grids of samples as small pictures inside a page, with a fixed limit on their total size."""

import base64
import io
import os
import warnings
from collections.abc import Sequence

from dnnlib.report.runs import Run

SIDE = 512        # pixels of the longer side, at most
PER_RUN = 8       # pictures of one run, at most
TOGETHER = 48     # pictures of all runs, at most; but always two per run
BUDGET = 2.8e6    # characters of all pictures in the page
SMALLEST = 32     # pixels; a picture that is too large even at this size is left out
QUALITIES = (90, 80, 65)


def strips(runs: Sequence[Run]) -> list[list[tuple[float, str | None]]]:
    """[[(kimg, data URI or None), ...] for each Run]: its first picture, its last, and some evenly spaced between them.

    None stands for a picture that cannot be read."""
    count = max(2, min(PER_RUN, TOGETHER // max(len(runs), 1)))
    chosen = [spaced(run.samples, count) for run in runs]
    limit = int(BUDGET / max(sum(map(len, chosen)), 1) * 3 / 4) - 64  # bytes; base64 makes four characters of three
    return [[(kimg, data_uri(path, limit)) for kimg, path in samples] for samples in chosen]


def spaced(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def data_uri(path: str | os.PathLike, limit: int) -> str | None:
    """A picture as a data: URI of at most `limit` bytes before base64, reduced in size as needed; None if it cannot be read."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(path, formats=('PNG',)) as picture:
                picture = picture.convert('L' if picture.mode in ('1', 'L') else 'RGB')
    except Exception:  # Pillow raises errors of many kinds for damaged files; none may prevent the page
        return None
    side, kinds = SIDE, [('png', {}), *(('jpeg', {'quality': quality}) for quality in QUALITIES)]
    while side >= SMALLEST:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        for kind, options in kinds:
            data = io.BytesIO()
            picture.save(data, kind, **options)
            if data.tell() <= limit:
                return f'data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}'
        side, kinds = side // 2, kinds[-len(QUALITIES):]  # a picture too large as a PNG is tried as a JPEG only
    return None

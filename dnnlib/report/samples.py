# SPDX-License-Identifier: Apache-2.0
"""Grids of samples as small pictures inside a page, within a number of bytes that does not depend on how large they are."""

import base64
import io
import warnings

SIDE = 512        # pixels, at most, of the longer side
PER_RUN = 8       # pictures of one run
TOGETHER = 48     # pictures of all runs, as far as two of each run allow
BUDGET = 2.8e6    # characters that all pictures take in the page
SMALLEST = 32     # pixels; a picture that needs more bytes even then is left out
QUALITIES = (90, 80, 65)


def strips(runs):
    """[[(kimg, data URI or None), ...] for each Run]: its first picture, its last, and some evenly spaced between them.

    None stands for a picture that cannot be read."""
    count = max(2, min(PER_RUN, TOGETHER // max(len(runs), 1)))
    chosen = [spaced(run.samples, count) for run in runs]
    limit = int(BUDGET / max(sum(map(len, chosen)), 1) * 3 / 4) - 64  # bytes; base64 makes four characters of three
    return [[(kimg, data_uri(path, limit)) for kimg, path in samples] for samples in chosen]


def spaced(items, count):
    """At most `count` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def data_uri(path, limit):
    """A picture as a data: URI of at most `limit` bytes before base64, made smaller as far as that needs; None where it cannot be read."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(path, formats=('PNG',)) as picture:
                picture = picture.convert('L' if picture.mode in ('1', 'L') else 'RGB')
    except Exception:  # Pillow raises errors of many kinds for damaged files, none of which should cost the page
        return None
    side, kinds = SIDE, [('png', {}), *(('jpeg', {'quality': quality}) for quality in QUALITIES)]
    while side >= SMALLEST:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        for kind, options in kinds:
            data = io.BytesIO()
            picture.save(data, kind, **options)
            if data.tell() <= limit:
                return f'data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}'
        side, kinds = side // 2, kinds[-len(QUALITIES):]  # what is too large as a PNG is one for JPEG
    return None

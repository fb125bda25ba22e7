# SPDX-License-Identifier: Apache-2.0
"""A contact sheet: some images of a data set in one picture, one row per class, noisy images last in their row and marked."""

import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dnnlib import UserError
from dnnlib.archive import decode_image
from dnnlib.files import replacing
from training.data.dataset import UNITS_8BIT

ROWS, COLUMNS = 10, 10
SIDE, LARGEST = 96, 128  # pixels of the longer side on the sheet: small images are enlarged by a whole number, large ones reduced
GAP, MARGIN, FONT, NAME = 4, 12, 12, 24  # NAME: characters of a row's label
PAPER, INK = 255, 40


def place(option: str | None, dest: str) -> str | None:
    """The path of the sheet: beside the archive, or as given by the option --sheet; None for "none". Raises UserError."""
    if option == 'none':
        return None
    if option is None:
        return f'{os.path.splitext(os.path.normpath(dest))[0]}-sheet.png'
    if not option.lower().endswith('.png'):
        raise UserError(f'--sheet={option}: must end in .png, or be "none"')
    if os.path.abspath(option).startswith(os.path.join(os.path.abspath(dest), '')):
        raise UserError(f'--sheet={option}: is inside --dest, where it would become an image of the data set')
    return option


def choose(labels, sigmas, indices):
    """Rows of indices for the sheet: of up to ROWS classes, evenly over all of them, images evenly over each; without classes, of all.

    labels, sigmas: lists that the indices point into, or None."""
    level = lambda index: sigmas[index] if sigmas else 0
    if not labels or isinstance(labels[indices[0]], list):
        chosen = _spread(indices, ROWS * COLUMNS)
        chosen.sort(key=level)
        return [chosen[i:i + COLUMNS] for i in range(0, len(chosen), COLUMNS)]
    classes = {}
    for index in indices:
        classes.setdefault(labels[index], []).append(index)
    return [sorted(_spread(classes[label], COLUMNS), key=level) for label in _spread(sorted(classes), ROWS)]


def _spread(items, count):
    """At most `count` items of a list, evenly spaced, starting with the first."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def draw(path: str, title: str, rows: Sequence, units: dict | None = None) -> None:
    """Writes the sheet as a PNG. rows: [(label of the row, [(name, bytes of the member, text below the image), ...]), ...].

    units: {offset, scale} of float data."""
    rows = [(head[:NAME], [(_visible(decode_image(name, data), units), note) for name, data, note in cells]) for head, cells in rows]
    height, width = (max(image.shape[axis] for _, cells in rows for image, _ in cells) for axis in (0, 1))
    font = ImageFont.load_default(FONT)
    line = FONT + 8 if any(note for _, cells in rows for _, note in cells) else 0
    left = max(int(font.getlength(head)) for head, _ in rows)
    left, top = MARGIN + (left + 2 * GAP if left else 0), 2 * MARGIN + FONT
    columns = max(len(cells) for _, cells in rows)
    wide = max(left + columns * (width + GAP) + MARGIN, 2 * MARGIN + int(font.getlength(title)))
    sheet = Image.new('RGB', (wide, top + len(rows) * (height + line + GAP) + MARGIN), (PAPER,) * 3)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, (INK,) * 3, font)
    for row, (head, cells) in enumerate(rows):
        y = top + row * (height + line + GAP)
        pen.text((MARGIN, y + height / 2), head, (INK,) * 3, font, anchor='lm')
        for column, (image, note) in enumerate(cells):
            x = left + column * (width + GAP)
            sheet.paste(Image.fromarray(image), (x, y))
            pen.text((x, y + height + 2), note, (INK,) * 3, font)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with replacing(path) as part:
        sheet.save(part, 'PNG')


def _visible(image, units):
    """[C,H,W] as stored -> 8-bit [H,W,3] in the size on the sheet: grey, or the first three channels; without alpha."""
    if image.dtype != np.uint8:
        offset, scale = (np.reshape((units or UNITS_8BIT)[key], [-1, 1, 1]) for key in ('offset', 'scale'))
        image = np.rint(((image - offset) / scale).clip(-1, 1) * 127.5 + 127.5).astype(np.uint8)
    image = np.repeat(image[:1], 3, axis=0) if len(image) < 3 else image[:3]
    image = np.ascontiguousarray(image.transpose(1, 2, 0))
    longest = max(image.shape)
    if longest > LARGEST:
        width, height = (max(1, round(side * LARGEST / longest)) for side in (image.shape[1], image.shape[0]))
        return np.asarray(Image.fromarray(image).resize((width, height), Image.LANCZOS))
    times = max(1, math.floor(SIDE / longest + 0.5))
    return image.repeat(times, axis=0).repeat(times, axis=1)

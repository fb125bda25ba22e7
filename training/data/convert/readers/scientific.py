# SPDX-License-Identifier: Apache-2.0
"""Images as instruments write them: FITS, DICOM and NIfTI. Values are physical ones, that is with their scale and offset applied."""

import os

import numpy as np

from dnnlib import UserError
from dnnlib.archive import MAX_DEFLATE
from training.data.convert.readers.formats import Capped, StackSource, head, needs, sized
from training.data.convert.readers.source import Kind

# ----------------------------------------------------------------------------------------------------
# FITS


class FitsSource(StackSource):
    """A FITS file, or a folder of them: the planes of an image HDU are images. Rows are as they are stored: the lowest comes first.

    hdu: number or name, by default the only one that holds an image. axis: "channels" makes the planes of a cube those of one image."""

    what = 'FITS'
    ENDINGS = tuple(ending + packed for ending in ('.fits', '.fit', '.fts') for packed in ('', '.gz', '.fz'))

    def __init__(self, path, hdu=None, axis=None):
        needs('astropy.io.fits', path)
        if axis not in (None, 'images', 'channels'):
            raise UserError(f'--source={path}: axis={axis}; choose images or channels')
        self.opens = FitsFile
        self.hold(path, hdu=hdu, axis=axis)

    @classmethod
    def fits(cls, path: str) -> bool:
        """By the ending of the name, or the first bytes."""
        return path.lower().endswith(cls.ENDINGS) or head(path, 10) == b'SIMPLE  = '


class FitsFile:
    """The planes of an image HDU."""

    TYPES = {8: 'u1', 16: 'i2', 32: 'i4', 64: 'i8', -32: 'f4', -64: 'f8'}

    def __init__(self, path, hdu=None, axis=None):
        from astropy.io import fits
        file = fits.open(path, memmap=False)
        self.close = file.close
        try:
            self._hdu = self._choose(file, hdu)
            self._check(path)
        except BaseException:
            self.close()
            raise
        self._lead = self._hdu.shape[:-2]
        self._planes = int(np.prod(self._lead, dtype=np.int64))
        self._as_channels = axis == 'channels'

    @staticmethod
    def _choose(file, hdu):
        if hdu is not None:
            try:
                found = file[hdu]
            except (KeyError, IndexError, TypeError):
                raise ValueError(f'hdu={hdu}: it has {", ".join(f"{k} {one.name}".strip() for k, one in enumerate(file))}') from None
            if not found.is_image or len(found.shape) < 2:
                raise ValueError(f'hdu={hdu} holds no image')
            return found
        found = {k: one for k, one in enumerate(file) if one.is_image and len(one.shape or ()) >= 2 and min(one.shape) > 0}
        if len(found) != 1:
            told = ', '.join(f'{k} {one.name} {list(one.shape)}' for k, one in list(found.items())[:20])
            raise ValueError(f'several HDUs hold images: {told}; give hdu= one of them' if found else 'no HDU in it holds an image')
        return next(iter(found.values()))

    def _check(self, path):
        """Reads the type of the values, and compares the size that the header claims with that of the file."""
        header = self._hdu.header
        self._type = np.dtype(self.TYPES[header['BITPIX']])
        self._is_scaled = header.get('BSCALE', 1) != 1 or header.get('BZERO', 0) != 0 or 'BLANK' in header or 'ZBLANK' in header
        told = int(np.prod(self._hdu.shape, dtype=object)) * self._type.itemsize
        is_packed = type(self._hdu).__name__ == 'CompImageHDU' or head(path, 2) in (b'\x1f\x8b', b'BZ', b'PK')
        start, size = 0 if is_packed else self._hdu.fileinfo()['datLoc'], os.path.getsize(path)
        if start + told > size * (MAX_DEFLATE if is_packed else 1):
            raise ValueError(f'cut off: it claims {told} bytes of values from {start} on, but has {size}')

    def __len__(self):
        return 1 if self._as_channels else self._planes

    def kind(self, k: int) -> Kind:
        """The Kind of an image."""
        return sized(self._planes if self._as_channels else 1, *self._hdu.shape[-2:], np.float32 if self._is_scaled else self._type)

    def read(self, k: int) -> np.ndarray:
        """An image; blank values are NaN."""
        if self._as_channels or not self._lead:
            found = self._hdu.section[...]
        else:
            found = self._hdu.section[tuple(int(place) for place in np.unravel_index(k, self._lead))]
        return np.asarray(found).reshape(-1, *self._hdu.shape[-2:])


# ----------------------------------------------------------------------------------------------------
# DICOM


class DicomSource(StackSource):
    """A DICOM file, or a folder of them in the order of their names: each frame is an image, with RescaleSlope and RescaleIntercept
    applied; where the least value is white (MONOCHROME1) it is turned. Padding keeps the value that it has."""

    what = 'DICOM'

    def __init__(self, path: str):
        needs('pydicom', path)
        self.opens = DicomFile
        self.hold(path)

    @classmethod
    def fits(cls, path: str) -> bool:
        """By the ending of the name; those without one by their first bytes."""
        name = os.path.basename(path).lower()
        return name.endswith(('.dcm', '.dicom', '.ima')) or '.' not in name[-5:] and name != 'dicomdir' and head(path, 132)[128:] == b'DICM'


class DicomFile:
    """The frames of a DICOM file."""

    COLOURS = ('MONOCHROME1', 'MONOCHROME2', 'RGB', 'YBR_FULL', 'YBR_FULL_422', 'YBR_RCT', 'YBR_ICT')

    def __init__(self, path):
        import pydicom
        self._file = Capped(path)
        self.close = self._file.close
        self._head = pydicom.dcmread(self._file, stop_before_pixels=True)
        self._frames = int(self._head.get('NumberOfFrames') or 1)
        sides = self._head.Rows, self._head.Columns, self._head.SamplesPerPixel, self._head.BitsAllocated
        bits = self._frames * int(np.prod([int(side) for side in sides], dtype=object))
        size, syntax = os.path.getsize(path), self._head.file_meta.TransferSyntaxUID
        most = size * 8 * (MAX_DEFLATE if syntax.is_deflated else 1)
        if not 0 < self._frames <= size or not syntax.is_encapsulated and bits > most:
            raise ValueError(f'it claims {self._frames} frames and {bits // 8} bytes of values, but has {size}')

    def __len__(self):
        return self._frames

    def _scale(self, frame):
        """(slope, intercept) of a frame, from its own group, that of all, or the file."""
        own = self._head.get('PerFrameFunctionalGroupsSequence') or []
        groups = [*own[frame:frame + 1], *(self._head.get('SharedFunctionalGroupsSequence') or [])]
        found = [part for group in groups for part in group.get('PixelValueTransformationSequence') or []]
        part = found[0] if found else self._head
        if 'ModalityLUTSequence' in self._head:
            raise ValueError('its values go through a table (ModalityLUTSequence), which is not applied')
        slope, intercept = part.get('RescaleSlope'), part.get('RescaleIntercept')
        return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)

    def kind(self, k: int) -> Kind:
        """The Kind of a frame."""
        head = self._head
        if head.PhotometricInterpretation not in self.COLOURS:
            raise ValueError(f'colours of the kind {head.PhotometricInterpretation}; save it in grey or RGB')
        bits, is_signed = int(head.BitsAllocated), int(head.get('PixelRepresentation', 0))
        if self._scale(k) != (1, 0):
            dtype = np.dtype(np.float32)
        elif bits == 8 and int(head.BitsStored) == 8 and not is_signed:
            dtype = np.dtype(np.uint8)
        else:
            dtype = np.dtype(f'{"i" if is_signed else "u"}{max(bits, 16) // 8}')
        return sized(head.SamplesPerPixel, head.Rows, head.Columns, dtype)

    def read(self, k: int) -> np.ndarray:
        """A frame."""
        from pydicom.pixels import pixel_array
        self._file.seek(0)
        try:
            found = pixel_array(self._file, index=k)
        except (RuntimeError, NotImplementedError, AttributeError) as err:
            if 'decompress' in str(err) or 'plugin' in str(err) or 'dependenc' in str(err):
                name = self._head.file_meta.TransferSyntaxUID.name
                raise ValueError(f'compressed by {name}, which needs a decoder: pip install "pylibjpeg[all]"') from None
            raise
        found = found[None] if found.ndim == 2 else np.moveaxis(found, -1, 0)
        slope, intercept = self._scale(k)
        if self._head.PhotometricInterpretation == 'MONOCHROME1':
            if (slope, intercept) != (1, 0):
                raise ValueError('the least value is white (MONOCHROME1), and values have a scale: which way they go is not known')
            least = -1 if int(self._head.PixelRepresentation) else 2 ** int(self._head.BitsStored) - 1
            found = (least - found.astype(np.int64)).astype(found.dtype)
        if (slope, intercept) != (1, 0):
            return found * slope + intercept
        return found if self.kind(k).is_8bit or found.dtype != np.uint8 else found.astype(np.uint16)


# ----------------------------------------------------------------------------------------------------
# NIfTI


class NiftiSource(StackSource):
    """A NIfTI volume, or a folder of them: slices along an axis are images, with scl_slope and scl_inter applied.

    axis: 0, 1 or 2, across which the slices lie; rows and columns are the other two in their order. volume: which one of those along
    the fourth axis, counted from 0."""

    what = 'NIfTI'

    def __init__(self, path, axis=2, volume=None):
        needs('nibabel', path)
        if axis not in (0, 1, 2):
            raise UserError(f'--source={path}: axis={axis}; choose 0, 1 or 2')
        self.opens = NiftiFile
        self.hold(path, axis=axis, volume=volume)

    @classmethod
    def fits(cls, path: str) -> bool:
        """By the ending of the name."""
        return path.lower().endswith(('.nii', '.nii.gz'))


class NiftiFile:
    """The slices of a NIfTI volume."""

    def __init__(self, path, axis=2, volume=None):
        import nibabel
        from nibabel.arrayproxy import ArrayProxy
        image = nibabel.load(path, mmap=False)
        if not isinstance(image, nibabel.Nifti1Pair):
            raise ValueError('no NIfTI file')
        told = image.dataobj
        shape = [int(side) for side in told.shape]
        while len(shape) > 2 and shape[-1] == 1:
            shape.pop()
        if len(shape) == 4 and (not isinstance(volume, int) or not 0 <= volume < shape[3]):
            raise ValueError(f'it has {shape[3]} volumes along its fourth axis; give volume=0 or another up to {shape[3] - 1}')
        if len(shape) not in (2, 3, 4):
            raise ValueError(f'of shape {list(told.shape)}; expected a volume of three axes')
        self._is_packed = head(path, 2) == b'\x1f\x8b'
        size = int(np.prod(told.shape, dtype=object)) * told.dtype.itemsize
        if size > os.path.getsize(path) * (MAX_DEFLATE if self._is_packed else 1):
            raise ValueError(f'cut off: it claims {size} bytes of values, but has {os.path.getsize(path)}')
        self._scale = float(told.slope), float(told.inter)
        self._raw = ArrayProxy(told.file_like, (tuple(told.shape), told.dtype, told.offset), mmap=False)
        self._shape, self._volume, self._axis = shape, volume if len(shape) == 4 else None, axis
        self._held = None

    def close(self):
        """Lets go of a volume that was decompressed."""
        self._held = None

    def __len__(self):
        return 1 if len(self._shape) == 2 else self._shape[self._axis]

    def kind(self, k: int) -> Kind:
        """The Kind of a slice."""
        sides = [side for axis, side in enumerate(self._shape[:3]) if len(self._shape) == 2 or axis != self._axis]
        return sized(1, *sides, np.float32 if self._scale != (1, 0) else self._raw.dtype)

    def read(self, k: int) -> np.ndarray:
        """A slice."""
        place = [slice(None)] * min(len(self._shape), 3)
        if len(place) == 3:
            place[self._axis] = k
        tail = (self._volume,) if self._volume is not None else (0,) * (len(self._raw.shape) - len(self._shape))
        if self._is_packed:  # from the beginning, whichever slice is wanted
            if self._held is None:
                self._held = np.asarray(self._raw[(*[slice(None)] * len(place), *tail)])
            found = self._held[tuple(place)]
        else:
            found = np.asarray(self._raw[(*place, *tail)])
        slope, intercept = self._scale
        return found[None] if (slope, intercept) == (1, 0) else (found * slope + intercept)[None]

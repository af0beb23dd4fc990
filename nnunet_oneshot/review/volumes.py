"""Images and labels as NIfTI in memory, for a viewer in the browser, whatever format the dataset has."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import numpy.typing as npt

from sam2_propagation.interface import Image, LabelVolume

_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""SimpleITK's axes point left and back, NIfTI's right and front."""


def image_nifti(image: Image, channel: int = 0) -> bytes:
    """One channel of an image as .nii.gz; colour pictures (three channels of 0 to 255, one slice) whole, as RGB."""
    if is_picture(image):
        stacked = np.ascontiguousarray(np.moveaxis(image.data, 0, -1).astype(np.uint8))
        return _nifti(stacked.view(_RGB)[..., 0], image)
    return _nifti(_small(image.data[channel]), image)


def label_nifti(label: LabelVolume, image: Image) -> bytes:
    """A label of values below 256, (Z, Y, X) on the image's grid, as .nii.gz."""
    return _nifti(label.astype(np.uint8), image)


def is_picture(image: Image) -> bool:
    """True for a colour picture."""
    data = image.data
    return data.shape[:2] == (3, 1) and bool(data.min() >= 0) and bool(data.max() <= 255)


def affine(image: Image) -> npt.NDArray[np.float64]:
    """4x4, from voxel (x, y, z) to millimetres (right, front, up)."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.asarray(image.direction).reshape(3, 3) * np.asarray(image.spacing)[::-1]
    matrix[:3, 3] = image.origin
    return _TO_RAS @ matrix


def _nifti(data: npt.NDArray[np.generic], image: Image) -> bytes:
    # The first level of gzip: it goes no further than this machine.
    return gzip.compress(nibabel.Nifti1Image(data.transpose(), affine(image)).to_bytes(), 1)


def _small(data: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
    """Whole numbers of 16 bits as such: half the bytes to send."""
    low, high = float(data.min()), float(data.max())
    if low >= -32768 and high <= 32767 and bool((data == np.round(data)).all()):
        return data.astype(np.int16)
    return data

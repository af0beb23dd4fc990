"""Labels carried to other images of the same patient by their place in space, without any registration.

Where a patient holds still between two acquisitions, scanner coordinates say more than any likeness of intensities: T1
and T2 of one session look unlike, yet lie on top of each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import SimpleITK as sitk

from sam2_propagation.interface import Image, LabelVolume, Propagation, Support

INSIDE, EXTENDED = "inside", "extended"


class PhysicalSpacePropagator:
    """Resamples the label of an image of the same patient to the query's grid, nearest neighbour.

    Beyond the annotated image nothing is known: there the view `inside` says background and `extended` repeats the
    label at the image's border, so that a structure which the border cuts diverges instead of ending there.

    Args:
        source: for each query, the case whose label it gets.
    """

    name = "same_patient"
    views: tuple[str, ...] = (INSIDE, EXTENDED)
    default_views: tuple[str, ...] = (INSIDE, EXTENDED)
    whole_set = False

    def __init__(self, source: Mapping[str, str]) -> None:
        self.source = dict(source)

    def fit(self, images: Iterable[Image]) -> None:
        """Nothing to learn."""

    def adapt(self, supports: Sequence[Support], views: Sequence[str]) -> None:
        """Nothing to learn."""

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        """Yield one Propagation for each query and view; `covered` is the share of its voxels in the annotated image.

        Raises:
            KeyError: a query without a source, or whose source is not among the supports.
        """
        by_case = {support.image.case: support for support in supports}
        for query in queries:
            yield from _carried(by_case[self.source[query.case]], query, views)


def _carried(support: Support, query: Image, views: Sequence[str]) -> Iterator[Propagation]:
    label = _as_itk(support.label, support.image)
    covered = float(_resampled(_as_itk(np.ones_like(support.label), support.image), query, extend=False).mean())
    for view in views:
        if covered == 0:
            reason = f"it lies wholly outside {support.image.case}, the annotated image of the same patient"
            yield Propagation(query.case, view, None, reason=reason)
        else:
            found = _resampled(label, query, extend=view == EXTENDED)
            yield Propagation(query.case, view, found, scores={"covered": covered})


def _resampled(label: sitk.Image, query: Image, extend: bool) -> LabelVolume:
    """int16 (Z, Y, X) on the query's grid; 0 outside, or the nearest voxel of the label."""
    resample = sitk.ResampleImageFilter()
    resample.SetReferenceImage(_as_itk(np.zeros(query.shape, np.int16), query))
    resample.SetInterpolator(sitk.sitkNearestNeighbor)
    resample.SetUseNearestNeighborExtrapolator(extend)
    return np.asarray(sitk.GetArrayFromImage(resample.Execute(label)), np.int16)


def _as_itk(array: LabelVolume, like: Image) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(like.spacing[::-1])
    image.SetOrigin(like.origin)
    image.SetDirection(like.direction)
    return image

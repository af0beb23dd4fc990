"""The published checkpoints: names, files, addresses, configurations and hashes.

The sha256 sums of the eight sam2 files are those that Hugging Face shows for `facebook/sam2*-hiera-*` (git-lfs object
ids); for MedSAM2's files no published sum was found, so those are not checked.
"""

from __future__ import annotations

from dataclasses import dataclass

_META = "https://dl.fbaipublicfiles.com/segment_anything_2"
_MEDSAM2 = "https://huggingface.co/wanglab/MedSAM2/resolve/main"


@dataclass(frozen=True)
class Published:
    """A checkpoint that its authors offer for download.

    Attributes:
        name: what the user types.
        file_name: the file's name at its address and in the cache folder.
        url: where it is.
        configuration: a name of `architecture.known_configurations`.
        sha256: hexadecimal sum, or None where none is known.
    """

    name: str
    file_name: str
    url: str
    configuration: str
    sha256: str | None = None


_SUMS = {
    "sam2.1_hiera_tiny": "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
    "sam2.1_hiera_small": "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
    "sam2.1_hiera_base_plus": "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
    "sam2.1_hiera_large": "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
    "sam2_hiera_tiny": "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125",
    "sam2_hiera_small": "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3",
    "sam2_hiera_base_plus": "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071",
    "sam2_hiera_large": "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b",
}
_VARIANTS = ("latest", "2411", "CTLesion", "MRI_LiverLesion", "US_Heart")


def _sam2(name: str) -> Published:
    release = "092824" if name.startswith("sam2.1") else "072824"
    return Published(name, f"{name}.pt", f"{_META}/{release}/{name}.pt", name, _SUMS[name])


def _medsam2(variant: str) -> Published:
    file_name = f"MedSAM2_{variant}.pt"
    return Published(f"medsam2_{variant.lower()}", file_name, f"{_MEDSAM2}/{file_name}", "medsam2")


PUBLISHED: dict[str, Published] = {p.name: p for p in [*map(_sam2, _SUMS), *map(_medsam2, _VARIANTS)]}
"""Every published checkpoint by the name that a user types."""


def by_sum(sha256: str) -> Published | None:
    """The published checkpoint with this sum, if any."""
    return next((p for p in PUBLISHED.values() if p.sha256 == sha256), None)


def by_file_name(file_name: str) -> Published | None:
    """The published checkpoint with this file name (in any case), if any."""
    return next((p for p in PUBLISHED.values() if p.file_name.lower() == file_name.lower()), None)

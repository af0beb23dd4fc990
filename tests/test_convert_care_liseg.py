"""The CARE-Liver layout to one dataset a modality, on made-up trees with the naming differences that are about."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_oneshot.convert_care_liseg import convert_care_liseg, parse_volume
from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.errors import OneShotError

SIZE = (6, 5, 4)


def volume(path: Path, values: np.ndarray | None = None, size: tuple[int, ...] = SIZE, x: float = 1.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full(size[::-1], 7, np.int16) if values is None else values
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((x, 1.5, 6.0))
    sitk.WriteImage(image, str(path))


def blob() -> np.ndarray:
    array = np.zeros(SIZE[::-1], np.int16)
    array[1:3, 1:4, 1:4] = 2
    return array


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    return tmp_path / "raw"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two vendors; the first patient of each is annotated; modalities are missing here and there."""
    root = tmp_path / "LiQA_training_data"
    for folder, files in {
        "Vendor_A/1009-A-S4": ("T1", "T2", "DWI_800", "GED1", "GED4"),
        "Vendor_A/1010-A-S1": ("T1", "DWI_400", "DWI_800", "GED4"),
        "Vendor_B1/0241-B1-S2": ("T1", "T2", "GED4"),
        "Vendor_B1/0482-B1-S3": ("GED4",),
    }.items():
        for name in files:
            volume(root / folder / f"{name}.nii.gz")
    for folder in ("Vendor_A/1009-A-S4", "Vendor_B1/0241-B1-S2"):
        # The mask's header is a little off, as converted masks are.
        volume(root / folder / "mask_GED4.nii.gz", blob(), x=1.5001)
    return root


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_dataset_a_modality_with_the_same_case_names(raw: Path, data: Path) -> None:
    done = convert_care_liseg(data, 720)
    assert [d.name for d in done.datasets] == [
        "Dataset720_care_liseg_GED4",
        "Dataset721_care_liseg_GED1",
        "Dataset722_care_liseg_T1",
        "Dataset723_care_liseg_T2",
        "Dataset724_care_liseg_DWI",
    ]
    opened = open_dataset(720)
    assert [c.name for c in opened.cases] == ["A_1009", "A_1010", "B1_0241", "B1_0482"]
    assert [c.name for c in opened.annotated] == ["A_1009", "B1_0241"]
    label = opened.annotated[0].label
    np.testing.assert_array_equal(opened.read_label(label), blob() // 2)
    spacings = [sitk.ReadImage(str(p)).GetSpacing() for p in (label, opened.annotated[0].images[0])]
    assert spacings[0] == spacings[1]
    assert [c.name for c in open_dataset(723).cases] == ["A_1009", "B1_0241"]
    assert not open_dataset(723).annotated
    origin = json.loads((done.datasets[0] / "care_liseg.json").read_text())
    assert origin["cases"]["B1_0241"] == {
        "patient": "B1_0241",
        "folder": "Vendor_B1/0241-B1-S2",
        "file": "GED4.nii.gz",
    }
    assert not any("S4" in name for name in files(raw))


def test_several_b_values_and_modalities_without_labels_are_said(raw: Path, data: Path) -> None:
    notes = convert_care_liseg(data, 720).notes
    assert "A_1010: DWI_800.nii.gz was taken, DWI_400.nii.gz passed over" in notes
    assert any(n.startswith("T2: no case is annotated") for n in notes)


def test_support_of_another_modality(raw: Path, data: Path) -> None:
    convert_care_liseg(data, 720, modalities=["T2"], support="GED4")
    opened = open_dataset(720)
    assert [c.name for c in opened.cases] == ["A_1009", "A_1009_GED4", "B1_0241", "B1_0241_GED4"]
    assert [c.name for c in opened.annotated] == ["A_1009_GED4", "B1_0241_GED4"]
    origin = json.loads((opened.folder / "care_liseg.json").read_text())["cases"]
    assert origin["A_1009_GED4"]["patient"] == origin["A_1009"]["patient"]


def test_validation_data_go_to_images_ts(raw: Path, data: Path, tmp_path: Path) -> None:
    volume(tmp_path / "LiQA_val" / "Vendor_B2" / "0001-B2" / "GED4.nii.gz")
    convert_care_liseg(data, 720, modalities=["ged4"], test=tmp_path / "LiQA_val")
    assert files(raw / "Dataset720_care_liseg_GED4" / "imagesTs") == ["B2_0001_0000.nii.gz"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Vendor_A/1009-A-S4/GED4.nii.gz", ("A_1009", "GED4", False, 0)),
        ("vendor_b1/0241_B1_S2/mask_ged4.nii.gz", ("B1_0241", "GED4", True, 0)),
        ("VendorC/77/T1WI.nii", ("C_77", "T1", False, 0)),
        ("1009-A/GED_1.nii.gz", ("A_1009", "GED1", False, 0)),
        ("Vendor_A/1009-A/DWI-b50.nii.gz", ("A_1009", "DWI", False, 50)),
        ("Vendor_A/1009-A/DWI_800_seg.nii.gz", ("A_1009", "DWI", True, 800)),
        ("Vendor_A/1009-A/GED4_mask.NII.GZ", ("A_1009", "GED4", True, 0)),
        ("Vendor_A/1009-A/mask_GED4_registered_to_T1.nii.gz", None),
        ("Vendor_A/1009-A/T12.nii.gz", None),
        ("Vendor_A/1009-A/GED4.png", None),
        ("Vendor_A/notes/GED4.nii.gz", None),
        ("77/T1.nii.gz", None),
    ],
)
def test_names(path: str, expected: tuple[str, str, bool, int] | None) -> None:
    found = parse_volume(Path("/data") / path, Path("/data"))
    assert (found and (found.case, found.modality, found.mask, found.b_value)) == expected


def test_dry_run_writes_nothing_and_hidden_files_are_passed_over(raw: Path, data: Path, tmp_path: Path) -> None:
    (data / "Vendor_A" / "1009-A-S4" / "._GED4.nii.gz").write_bytes(b"resource fork")
    (data / "__MACOSX" / "1009-A-S4").mkdir(parents=True)
    (data / "__MACOSX" / "1009-A-S4" / "GED4.nii.gz").write_bytes(b"")
    volume(data / "Vendor_A" / "1009-A-S4" / "mystery.nii.gz")
    before = files(tmp_path)
    done = convert_care_liseg(data, 720, dry_run=True)
    assert files(tmp_path) == before
    lines = done.lines(verbose=True)
    assert "nothing was written: this was a dry run" in lines
    assert "Dataset720_care_liseg_GED4: 4 in imagesTr, 2 in labelsTr" in lines
    assert any(line.endswith("1010-A-S1/GED4.nii.gz -> imagesTr/A_1010_0000.nii.gz") for line in lines)
    assert [n for n in done.notes if "not understood" in n] == [
        "not understood and passed over: Vendor_A/1009-A-S4/mystery.nii.gz"
    ]


def test_bad_input_writes_nothing(raw: Path, data: Path, tmp_path: Path) -> None:
    def refuses(match: str, source: Path = data, **options: object) -> None:
        with pytest.raises(OneShotError, match=match):
            convert_care_liseg(source, 720, **options)
        assert not list(raw.iterdir())

    refuses("found no folder", tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.nii.gz").touch()
    refuses("found 1 files and none of that kind; give the unpacked LiQA_training_data", tmp_path / "other")
    refuses("found CT; choose among them", modalities=["CT"])
    mask = data / "Vendor_A" / "1009-A-S4" / "mask_GED4.nii.gz"
    volume(mask, size=(7, 5, 4))
    refuses(r"have the size of GED4.nii.gz, \(6, 5, 4\), found \(7, 5, 4\)")
    mask.write_bytes(b"broken")
    refuses("damaged or unknown")
    volume(mask, np.random.default_rng(0).integers(0, 2, SIZE[::-1]).astype(np.int16))
    mask.write_bytes(mask.read_bytes()[:-40])
    refuses("damaged or unknown")
    volume(mask, blob())
    volume(data / "Vendor_A" / "1009-A-S4" / "GED_4.nii.gz")
    refuses("expected one GED4 of patient A_1009")


@pytest.mark.parametrize("dry_run", [True, False])
def test_files_of_other_kinds_are_counted(raw: Path, data: Path, tmp_path: Path, dry_run: bool) -> None:
    (data / "Vendor_A" / "1009-A-S4" / "IM0001.dcm").write_bytes(b"slice")
    (data / "Vendor_A" / "patients.xlsx").write_bytes(b"table")
    (data / "Vendor_A" / ".DS_Store").write_bytes(b"")
    done = convert_care_liseg(data, 720, dry_run=dry_run)
    wanted = "2 other files passed over (for example Vendor_A/1009-A-S4/IM0001.dcm)"
    assert [note for note in done.notes if "other file" in note] == [wanted]
    assert f"note: {wanted}" in done.lines()

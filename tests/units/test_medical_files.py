"""Hospitals' files, written by the libraries that read them: numbers, order, orientation, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import MPEG2MPML, CTImageStorage, ExplicitVRLittleEndian, JPEGLosslessSV1, generate_uid

from lowrank.cli import main
from lowrank.data.images.decode import Damaged, Reading, read_image
from lowrank.data.images.medical import ENVELOPED, read_volume
from lowrank.data.images.source import images

SECRET = "Doe^Jane"
VOLUME = np.random.default_rng(0).integers(0, 1000, size=(6, 8, 10)).astype(np.int16)  # slices, rows, columns


def dicom(
    path: Path, stored: np.ndarray, place: float = 0.0, syntax: str = ExplicitVRLittleEndian, **more: Any
) -> Path:
    """A DICOM file of 16 bits with a patient in its header."""
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = syntax
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid()
    file.PatientName, file.PatientID, file.SeriesInstanceUID = SECRET, "MRN-4711", "1.2.3"
    file.Rows, file.Columns = stored.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 1
    file.RescaleSlope, file.RescaleIntercept = 1, 0
    file.PixelSpacing, file.ImageOrientationPatient = [2, 2], [1, 0, 0, 0, 1, 0]
    file.ImagePositionPatient = [0, 0, place]
    for name, value in more.items():
        setattr(file, name, value)
    file.PixelData = stored.astype("<i2").tobytes()
    if syntax != ExplicitVRLittleEndian:
        file["PixelData"].VR = "OB"
        file.PixelData = (
            b"\xfe\xff\x00\xe0\x00\x00\x00\x00\xfe\xff\x00\xe0\x04\x00\x00\x00abcd\xfe\xff\xdd\xe0\x00\x00\x00\x00"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, volume: np.ndarray = VOLUME, **more: Any) -> Path:
    """A folder of slices 3 mm apart, whose names are in no order."""
    for i, plane in enumerate(volume):
        dicom(folder / f"{(i * 5) % 7}.dcm", plane, place=3.0 * i, **more)
    return folder


def test_a_series_is_sorted_by_position_and_its_numbers_are_what_it_means(tmp_path: Path) -> None:
    raw = read_volume(series(tmp_path / "s", RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400))
    assert np.array_equal(raw.values, VOLUME * 2.0 - 1024)
    assert (raw.spacing, raw.window) == ((3.0, 2.0, 2.0), "-160.0,240.0")
    turned = read_volume(series(tmp_path / "t", ImageOrientationPatient=[-1, 0, 0, 0, -1, 0]))  # face down
    assert np.array_equal(turned.values, VOLUME[:, ::-1, ::-1])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SLA"])
def test_nifti_is_brought_to_one_orientation(tmp_path: Path, axes: str) -> None:
    plain = nib.Nifti1Image(VOLUME.transpose(2, 1, 0), np.diag([-2.0, -2, 3, 1]))  # LPS, as the series is
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(axes))
    nib.save(plain.as_reoriented(turn), tmp_path / "a.nii.gz")
    raw = read_volume(tmp_path / "a.nii.gz")
    assert np.array_equal(raw.values, VOLUME)
    assert raw.spacing == pytest.approx((3, 2, 2))


def test_voxels_become_cubes_and_are_padded_cropped_or_stretched(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.full((8, 8, 4), 200, np.uint8), np.diag([-1.0, -1, 4, 1]))  # 8 × 8 × 16 mm
    nib.save(image, tmp_path / "a.nii")
    for fit, filled in (("pad", 8 * 4 * 4), ("crop", 8**3), ("stretch", 8**3)):
        found = read_image(tmp_path / "a.nii", Reading(size=8, depth=8, fit=fit))  # type: ignore[arg-type]
        assert found.shape == (8, 8, 8)
        assert (found == 200).sum() == filled


def test_single_dicom_images_by_window_and_inverted(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.int16).reshape(16, 16)
    reading = Reading(size=16, grey=True)
    plain = read_image(dicom(tmp_path / "a.dcm", ramp, WindowCenter=127.5, WindowWidth=255), reading)
    assert np.array_equal(plain, ramp)
    more = {"WindowCenter": 127.5, "WindowWidth": 255, "PhotometricInterpretation": "MONOCHROME1"}
    assert np.array_equal(read_image(dicom(tmp_path / "b.dcm", ramp, **more), reading), 255 - ramp)
    told = Reading(size=16, grey=True, window="0,51")
    assert np.array_equal(read_image(tmp_path / "a.dcm", told), (ramp * 5).clip(0, 255))
    nib.save(nib.Nifti1Image(ramp[..., None], np.diag([-1.0, -1, 1, 1])), tmp_path / "c.nii")
    assert np.array_equal(read_image(tmp_path / "c.nii", Reading(size=16, grey=True, window="0,255")), ramp.T)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "5.dcm").unlink(), "1 of its slices are missing"),
        (lambda d: dicom(d / "x.dcm", VOLUME[0], place=6.0), "1 of its slices lie where another does"),
        (lambda d: dicom(d / "x.dcm", VOLUME[0], place=16.1), "spacings are mixed"),
        (lambda d: dicom(d / "x.dcm", VOLUME[0], place=18.0, PixelSpacing=[1, 1]), "different pixel spacings"),
        (lambda d: dicom(d / "x.dcm", VOLUME[0], place=18.0, SeriesInstanceUID="1.2.4"), "of several series"),
        (lambda d: dicom(d / "x.dcm", VOLUME[0, :4], place=18.0), "of different sizes"),
        (lambda d: dicom(d / "x.dcm", VOLUME[0], place=18.0, syntax=JPEGLosslessSV1), "JPEG Lossless.*pip install"),
        (lambda d: dicom(d / "x.dcm", VOLUME[0], place=18.0, syntax=MPEG2MPML), "MPEG2.*nothing here reads"),
        (lambda d: dicom(d / "x.dcm", VOLUME[0], place=18.0, NumberOfFrames=2), "it holds 2 frames.*dcm2niix"),
        (lambda d: (d / "x.dcm").write_bytes(b"junk"), "x.dcm is no DICOM file"),
        (lambda d: (d / "x.dcm").write_bytes(b"0\x80" + ENVELOPED + b"\xa0\x80"), "x.dcm is encrypted"),
        (lambda d: [p.unlink() for p in d.glob("*.dcm") if p.name != "0.dcm"], "a volume of one slice"),
    ],
)
def test_what_is_no_volume_is_refused_by_name_and_without_the_patient(tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(series(tmp_path / "s"))
    with pytest.raises(Damaged, match=message) as error:
        read_image(tmp_path / "s", Reading(size=8, depth=8))
    assert SECRET not in str(error.value)


def test_a_volume_among_images_and_a_picture_among_volumes_say_what_they_need(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(VOLUME, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(Damaged, match=r"a volume of 10 slices: --data\.volumes true"):
        read_image(tmp_path / "a.nii.gz", Reading(size=8))
    (tmp_path / "b.nii.gz").write_bytes(b"junk")
    with pytest.raises(Damaged, match="no NIfTI file"):
        read_image(tmp_path / "b.nii.gz", Reading(size=8))
    (tmp_path / "c.png").write_bytes(b"junk")
    with pytest.raises(Damaged, match="it is no volume"):
        read_image(tmp_path / "c.png", Reading(size=8, depth=8))


def test_a_folder_of_both_kinds_trains_and_predicts_and_no_header_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    for number in range(10):
        bright = VOLUME + 1000 * (number % 2)
        place = tmp_path / "data" / "ab"[number % 2]
        if number % 3:
            series(place / f"p{number}", bright)
        else:
            place.mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(bright.transpose(2, 1, 0), np.diag([-2.0, -2, 3, 1]))
            image.header["descrip"] = SECRET.encode()
            nib.save(image, place / f"p{number}.nii.gz")
    words = ["--data", str(tmp_path / "data"), "--data.volumes", "true", "--data.size", "8", "--data.window", "0,2000"]
    shape = ["--model.image_size", "8", "--model.patch_size", "4", "--model.width", "8", "--model.heads", "2"]
    run = str(tmp_path / "run")
    assert main(["train", "vit-3d", *words, *shape, "--steps", "1", "--batch-size", "4", "--out", run]) == 0
    data = images(str(tmp_path / "data"), volumes=True, size=8, window="0,2000")
    assert {len(split.images[:1].shape) for split in data.set.splits.values()} == {4}
    assert sum(map(len, data.set.splits.values())) == 10
    capsys.readouterr()
    assert main(["predict", "--base", run, str(tmp_path / "data" / "b")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    for path in [*(tmp_path / "run").rglob("*"), *(tmp_path / "cache").rglob("*")]:
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret in content for secret in (SECRET.encode(), b"MRN-4711")), path

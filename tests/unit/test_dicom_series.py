"""One series: where its voxels lie and what they are, and what is refused."""

import nibabel
import numpy as np
import pytest
import SimpleITK

from tests.dicom import (
    AXIAL,
    CASE,
    CT,
    OBLIQUE_CORONAL,
    ORIGIN,
    PET,
    import_series,
    refused,
    uid,
    values,
    volume,
    voxel_position,
    write_series,
)

pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
pytest.importorskip("highdicom", reason="the extra 'dicom' is not installed")

SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE_CORONAL, SAGITTAL])
def test_voxels_lie_where_dicom_says(tmp_path, orientation):
    stored = volume()
    write_series(tmp_path / "src", stored, "CT", slopes=2, intercept=-1024, orientation=orientation)
    assert import_series(tmp_path, "--channels", CT) == 0
    image = nibabel.load(tmp_path / "out" / f"{CASE}_0000.nii.gz")
    data = np.asarray(image.dataobj)
    assert data.shape == stored.shape[::-1]
    for index in np.ndindex(*stored.shape):
        z, y, x = index
        assert data[x, y, z] == stored[index] * 2 - 1024
        place = image.affine[:3] @ [x, y, z, 1]
        np.testing.assert_allclose(place, LPS_TO_RAS @ voxel_position(index, orientation), atol=1e-4)


def test_whole_numbers_stay_whole(tmp_path):
    write_series(tmp_path / "src", volume(), "CT", intercept=-1024)
    import_series(tmp_path, "--channels", CT)
    assert values(tmp_path).dtype == np.int16


def test_every_slice_has_its_own_scale(tmp_path):
    """The first one's is whole, so that a reader that takes its type for all loses the others' fractions."""
    stored, slopes = volume(dtype=np.uint16), [1, 0.5, 0.25, 2.5, 1.125, 0.1]
    write_series(tmp_path / "src", stored, "PT", slopes=slopes)
    import_series(tmp_path, "--channels", PET)
    np.testing.assert_allclose(values(tmp_path), stored * np.array(slopes)[:, None, None], rtol=1e-6)


def test_rescaling_counts_in_mr_too(tmp_path):
    """Readers differ here: the attribute is not of DICOM's MR images, and some scanners write it."""
    stored = volume()
    write_series(tmp_path / "src", stored, "MR", RescaleSlope=2.5, RescaleIntercept=-3)
    import_series(tmp_path, "--channels", "MR=Modality==MR")
    np.testing.assert_allclose(values(tmp_path), stored * 2.5 - 3)


def test_positions_rounded_to_a_tenth_are_regular(tmp_path):
    def rounded(index, dataset):
        dataset.ImagePositionPatient = [round(float(value), 1) for value in dataset.ImagePositionPatient]

    write_series(tmp_path / "src", volume((9, 4, 4)), spacing=(3.27, 1, 1), change=rounded)
    import_series(tmp_path, "--channels", CT)
    image = SimpleITK.ReadImage(str(tmp_path / "out" / f"{CASE}_0000.nii.gz"))
    assert image.GetSpacing()[2] == pytest.approx(3.27, abs=0.02)


def compressed(name):
    """A real image of pydicom's, compressed by others than GDCM, and its pixels."""
    from pydicom.data import get_testdata_file

    file = get_testdata_file(name, download=False)
    if file is None:
        pytest.skip(f"pydicom comes without {name}")
    return pydicom.dcmread(file), pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array


@pytest.mark.parametrize("name", ["RLE", "bigendian", "implicit", "jp2klossless", "jpeg_ls_lossless"])
def test_transfer_syntaxes_that_are_read(tmp_path, name):
    dataset, pixels = compressed(f"MR_small_{name}.dcm")
    (tmp_path / "src").mkdir()
    for index in range(2):
        dataset.ImagePositionPatient = [0, 0, float(index)]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid(index)
        dataset.save_as(tmp_path / "src" / str(index))
    import_series(tmp_path, "--channels", "MR=Modality==MR", "--case", "{Modality}")
    np.testing.assert_array_equal(values(tmp_path, case="MR"), np.stack([pixels, pixels]))


# what is no volume


def missing(index, dataset):
    if index >= 3:
        dataset.ImagePositionPatient[2] += 6


def uneven(index, dataset):
    if index >= 3:
        dataset.ImagePositionPatient[2] += 1


def tilted(index, dataset):
    dataset.ImagePositionPatient[1] += index * 0.5


def mixed(index, dataset):
    if index == 4:
        dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def twice(index, dataset):
    dataset.ImagePositionPatient[2] = ORIGIN[2] + 3 * (index // 2)


def multi_frame(index, dataset):
    dataset.NumberOfFrames, dataset.PixelData = 2, dataset.PixelData * 2


def colours(index, dataset):
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.PixelData = dataset.PixelData * 3


def inverted(index, dataset):
    dataset.PhotometricInterpretation = "MONOCHROME1"


def without_position(index, dataset):
    if index == 2:
        del dataset.ImagePositionPatient


def larger(index, dataset):
    if index == 5:
        dataset.Rows, dataset.PixelData = 10, dataset.PixelData * 2


def skewed(index, dataset):
    dataset.ImageOrientationPatient = [1, 0, 0, 0.1, 0.995, 0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (missing, "2 slices are missing, the first between 106.75 and 115.75 mm"),
        (uneven, "lie 3.000 to 4.000 mm apart"),
        (tilted, "shifted against each other, 9.46 degrees"),
        (mixed, "mixed orientations, 1 of 6"),
        (twice, "3 positions have several slices"),
        (multi_frame, "multi-frame"),
        (colours, "not MONOCHROME2"),
        (inverted, "not MONOCHROME2"),
        (without_position, "lacks PixelSpacing, ImagePositionPatient"),
        (larger, "different shape: from [5, 4] to [10, 4]"),
        (skewed, "not two unit vectors at right angles"),
    ],
)
def test_series_that_are_no_volume_are_refused(tmp_path, change, said):
    write_series(tmp_path / "src", volume(), change=change)
    message = refused(tmp_path, "--channels", CT)
    assert said in message
    assert "'CT 1'" in message  # which series


def test_one_slice_is_no_volume(tmp_path):
    write_series(tmp_path / "src", volume((1, 5, 4)))
    assert "one slice" in refused(tmp_path, "--channels", CT)


def test_other_transfer_syntaxes_are_named(tmp_path):
    for file in write_series(tmp_path / "src", volume()):
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
        dataset.PixelData = pydicom.encaps.encapsulate([b"12"])
        dataset["PixelData"].VR = "OB"
        dataset.save_as(file)
    assert "MPEG-4" in refused(tmp_path, "--channels", CT)


def test_a_file_that_is_cut_off_is_named_and_its_case_is_not_there(tmp_path):
    files = write_series(tmp_path / "src", volume((6, 40, 40)))
    files[2].write_bytes(files[2].read_bytes()[:-100])
    assert files[2].name in refused(tmp_path, "--channels", CT)

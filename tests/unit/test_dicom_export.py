import json

import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_multimodal import __version__, cli
from nnunet_multimodal.errors import UserError
from tests.dicom import AXIAL, CASE, CT, FDG, OBLIQUE_CORONAL, ORIGIN, PET, volume, voxel_position, write_series

pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
highdicom = pytest.importorskip("highdicom", reason="the extra 'dicom' is not installed")

LABELS = {"background": 0, "edema": 1, "core": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
CODES = {
    "core": {
        "category": ["49755003", "SCT", "Morphologically Abnormal Structure"],
        "type": ["108369006", "SCT", "Neoplasm"],
        "anatomic_region": ["12738006", "SCT", "Brain"],
    }
}


class Study:
    """A patient with CT and PET that were imported, and predictions on their grid."""

    def __init__(self, root, orientation=AXIAL, more=(), shape=(6, 5, 4)):
        self.root, self.orientation = root, orientation
        self.files = write_series(root / "src" / "ct", volume(shape, seed=1), "CT", orientation=orientation)
        write_series(root / "src" / "pt", volume(shape, seed=2), "PT", orientation=orientation, number=2, **FDG)
        cli.main(["dicom", "import", str(root / "src"), "-o", str(root / "images"), "--channels", CT, PET, *more])
        (root / "predictions" / "uncertainty").mkdir(parents=True)
        self.label_map = root / "predictions" / f"{CASE}.nii.gz"

    def predict(self, labels, declared=None, name=CASE):
        """A label map in nnU-Net's way: its reader's geometry, its writer."""
        io = SimpleITKIO()
        _, properties = io.read_images([str(self.root / "images" / f"{name}_0000.nii.gz")])
        io.write_seg(labels, str(self.root / "predictions" / f"{name}.nii.gz"), properties)
        dataset = {"labels": declared or LABELS, "file_ending": ".nii.gz"}
        (self.root / "predictions" / "dataset.json").write_text(json.dumps(dataset))

    def predict_map(self, values, kind="entropy"):
        """An uncertainty map, with the geometry of the first image."""
        image = SimpleITK.GetImageFromArray(values)
        image.CopyInformation(SimpleITK.ReadImage(str(self.root / "images" / f"{CASE}_0000.nii.gz")))
        SimpleITK.WriteImage(image, str(self.root / "predictions" / "uncertainty" / f"{CASE}_{kind}.nii.gz"))

    def export(self, *arguments):
        where = ["-i", str(self.root / "images"), "--series", str(self.root / "src"), "-o", str(self.root / "out")]
        return cli.main(["dicom", "export", str(self.root / "predictions"), *where, "-tr", "SSNTrainer", *arguments])

    def refused(self, *arguments):
        """What the export says when it refuses; it has written nothing."""
        with pytest.raises(UserError) as error:
            self.export(*arguments)
        assert not (self.root / "out").exists() or not list((self.root / "out").iterdir())
        return str(error.value)

    def object(self, kind="seg"):
        return pydicom.dcmread(self.root / "out" / f"{CASE}_{kind}.dcm")


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def random_labels(shape=(6, 5, 4)):
    labels = np.random.default_rng(5).integers(0, 3, shape).astype(np.uint8)
    labels[2] = 0  # a slice with nothing in it has no frame
    return labels


def frames(dataset):
    """Frames by segment (None in maps) and place of their first voxel, from the bare data set.

    Bits of binary segmentations are packed over all frames, the first voxel in the lowest bit (PS3.5 8.1.1).
    """
    shape = (int(dataset.NumberOfFrames), dataset.Rows, dataset.Columns)
    if "FloatPixelData" in dataset:
        pixels = np.frombuffer(dataset.FloatPixelData, "<f4").reshape(shape)
    else:
        bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
        pixels = bits[: np.prod(shape)].reshape(shape)
    found = {}
    for frame, groups in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        place = tuple(np.round(np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float), 3).tolist())
        named = groups.get("SegmentIdentificationSequence")
        found[named[0].ReferencedSegmentNumber if named else None, place] = frame
    assert len(found) == shape[0]
    return found


def place_of(slice_number, orientation):
    return tuple(np.round(voxel_position((slice_number, 0, 0), orientation), 3).tolist())


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE_CORONAL])
@pytest.mark.parametrize("declared", [LABELS, REGIONS])
def test_every_voxel_of_a_segmentation_is_where_it_was_predicted(tmp_path, orientation, declared):
    study = Study(tmp_path, orientation)
    labels = random_labels()
    study.predict(labels, declared)
    assert study.export() == 0
    dataset = study.object()
    found = frames(dataset)
    names = [name for name in declared if name != "background"]
    assert [segment.SegmentLabel for segment in dataset.SegmentSequence] == names
    expected_frames = 0
    for number, name in enumerate(names, start=1):
        mask = np.isin(labels, declared[name])
        for z in range(len(labels)):
            frame = found.get((number, place_of(z, orientation)))
            expected_frames += int(mask[z].any())
            np.testing.assert_array_equal(np.zeros_like(mask[z]) if frame is None else frame, mask[z])
    assert len(found) == expected_frames
    shared = dataset.SharedFunctionalGroupsSequence[0]
    directions = [*orientation[0], *orientation[1]]
    np.testing.assert_allclose(shared.PlaneOrientationSequence[0].ImageOrientationPatient, directions, atol=1e-9)
    assert shared.PixelMeasuresSequence[0].PixelSpacing == [1.5, 0.75]
    assert shared.PixelMeasuresSequence[0].SpacingBetweenSlices == 3


def test_highdicom_finds_the_label_map_again_by_the_slices_it_refers_to(study):
    labels = random_labels()
    study.predict(labels)
    study.export()
    seg = highdicom.seg.segread(study.root / "out" / f"{CASE}_seg.dcm")
    uids = [pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in study.files]
    found = seg.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(found, labels)


def test_a_segmentation_belongs_to_its_patient_study_and_coordinates(study):
    study.predict(random_labels())
    study.export()
    dataset, source = study.object(), pydicom.dcmread(study.files[0])
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "StudyDate"):
        assert dataset[keyword].value == source[keyword].value
    assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
    assert dataset.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    assert "Research only" in dataset.ContentDescription


def test_a_segmentation_names_what_made_it(study):
    study.predict(random_labels())
    plans = {"dataset_name": "Dataset007_PETCT", "plans_name": "nnUNetPlans"}
    (study.root / "predictions" / "plans.json").write_text(json.dumps(plans))
    study.export("-c", "3d_fullres")
    segment = study.object().SegmentSequence[0]
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert algorithm.AlgorithmName == "nnunet-multimodal SSNTrainer"
    assert algorithm.AlgorithmVersion == __version__
    parameters = "trainer=SSNTrainer,dataset=Dataset007_PETCT,plans=nnUNetPlans,configuration=3d_fullres"
    assert algorithm.AlgorithmParameters == parameters


def test_maps_keep_every_float_at_its_place(tmp_path):
    study = Study(tmp_path, OBLIQUE_CORONAL)
    study.predict(random_labels())
    entropy = np.random.default_rng(6).random((6, 5, 4)).astype(np.float32)
    study.predict_map(entropy)
    study.export()
    found = frames(study.object("entropy"))
    for z, expected in enumerate(entropy):
        np.testing.assert_array_equal(found[None, place_of(z, OBLIQUE_CORONAL)], expected)
    assert len(found) == len(entropy)


def test_maps_are_in_nats_and_of_research(study):
    study.predict(random_labels())
    study.predict_map(np.full((6, 5, 4), 0.5, np.float32), "mutual_information")
    study.export()
    dataset = study.object("mutual_information")
    mapping = dataset.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    unit = mapping.MeasurementUnitsCodeSequence[0]
    assert (unit.CodeValue, unit.CodingSchemeDesignator) == ("{nat}", "UCUM")
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
    assert dataset.ContentQualification == "RESEARCH"
    assert dataset.ReferencedSeriesSequence[0].SeriesInstanceUID == pydicom.dcmread(study.files[0]).SeriesInstanceUID


def test_maps_that_are_asked_for_must_be_there(study):
    study.predict(random_labels())
    assert "entropy.nii.gz is not there" in study.refused("--maps", "entropy")
    study.predict_map(np.zeros((6, 5, 4), np.float32))
    study.export("--maps")
    assert [file.name for file in (study.root / "out").iterdir()] == [f"{CASE}_seg.dcm"]


def test_a_prediction_of_nothing_has_empty_frames(study):
    study.predict(np.zeros((6, 5, 4), np.uint8))
    study.export()
    assert not any(frame.any() for frame in frames(study.object()).values())


def test_headers_that_were_emptied_by_de_identification(tmp_path):
    study = Study(tmp_path)
    for file in (tmp_path / "src").rglob("*.dcm"):
        dataset = pydicom.dcmread(file)
        for keyword in ("PatientName", "PatientBirthDate", "PatientSex", "StudyTime", "StudyID", "SliceThickness"):
            delattr(dataset, keyword)
        del dataset.AccessionNumber, dataset.ReferringPhysicianName
        dataset.save_as(file)
    labels = random_labels()
    study.predict(labels)
    study.export()
    assert frames(study.object())[1, place_of(0, AXIAL)].tolist() == (labels[0] == 1).tolist()


# codes


def test_labels_get_the_codes_that_are_given_and_the_others_say_that_none_were(study, capsys):
    (study.root / "codes.json").write_text(json.dumps(CODES))
    study.predict(random_labels())
    study.export("--codes", str(study.root / "codes.json"))
    edema, core = study.object().SegmentSequence
    assert core.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    assert core.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Neoplasm"
    assert core.AnatomicRegionSequence[0].CodeValue == "12738006"
    assert core.SegmentDescription == "core"
    assert edema.SegmentedPropertyTypeCodeSequence[0].CodeValue == "85756007"
    assert "generic" in edema.SegmentDescription
    assert "edema: coded as tissue" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ({"tumour": CODES["core"]}, "no label tumour; it has edema, core"),
        ({"core": {"type": ["108369006", "SCT", "Neoplasm"]}}, "give category and type"),
        ({"core": {"category": "Neoplasm", "type": ["108369006", "SCT", "Neoplasm"]}}, "core: category is 'Neoplasm'"),
        ({"core": {**CODES["core"], "colour": ["1", "2", "3"]}}, "give category and type"),
        ({"core": {**CODES["core"], "type": ["1" * 17, "SCT", "Neoplasm"]}}, "up to 16 characters"),
    ],
)
def test_codes_of_another_form_are_refused(study, codes, said):
    (study.root / "codes.json").write_text(json.dumps(codes))
    study.predict(random_labels())
    assert said in study.refused("--codes", str(study.root / "codes.json"))


# what does not belong together


def rewrite(study, change):
    image = SimpleITK.ReadImage(str(study.label_map))
    SimpleITK.WriteImage(change(image), str(study.label_map))


def moved(image):
    image.SetOrigin([ORIGIN[0] + 1, *ORIGIN[1:]])
    return image


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda image: SimpleITK.Flip(image, [False, False, True]), "origin"),  # the same places in another order
        (lambda image: image[:, :, 1:], "shape"),
        (moved, "origin"),
        (lambda image: SimpleITK.PermuteAxes(image, [1, 0, 2]), "shape"),
    ],
)
def test_predictions_on_other_grids_are_refused(study, change, said):
    study.predict(random_labels())
    rewrite(study, change)
    message = study.refused()
    assert "not on the grid of" in message
    assert said in message


def test_labels_that_are_not_declared_are_refused(study):
    study.predict(random_labels() + 1)
    assert "labels 3" in study.refused()


def test_a_map_on_another_grid_is_refused_before_anything_is_written(study):
    study.predict(random_labels())
    study.predict_map(np.zeros((6, 5, 4), np.float32))
    file = study.root / "predictions" / "uncertainty" / f"{CASE}_entropy.nii.gz"
    SimpleITK.WriteImage(moved(SimpleITK.ReadImage(str(file))), str(file))
    assert "entropy.nii.gz: not on the grid" in study.refused()


def test_a_series_that_lost_a_slice_is_refused(study):
    study.predict(random_labels())
    study.files[-1].unlink()  # at the end, so that the others are still a volume
    assert "not those that were imported" in study.refused()


def test_a_series_that_is_not_there_is_refused(study):
    study.predict(random_labels())
    for file in study.files:
        file.unlink()
    assert "not in the folder of --series" in study.refused()


def test_a_case_that_was_not_imported_is_refused(study):
    study.predict(random_labels())
    (study.root / "images" / f"{CASE}.json").unlink()
    assert "-i is the folder that nnunet-multimodal dicom import wrote" in study.refused()


def test_objects_refer_to_the_channel_on_whose_grid_the_prediction_lies(tmp_path):
    """PET was resampled onto CT: nothing can be said about its own slices."""
    study = Study(tmp_path)
    study.predict(random_labels())
    study.export("--channel", "PET")
    pet = next(iter(sorted((tmp_path / "src" / "pt").iterdir())))
    series = study.object().ReferencedSeriesSequence[0].SeriesInstanceUID
    assert series == pydicom.dcmread(pet).SeriesInstanceUID
    record = tmp_path / "images" / f"{CASE}.json"
    content = json.loads(record.read_text())
    content["channels"][1]["on_source_grid"] = False  # as --resample CT would write
    record.write_text(json.dumps(content))
    with pytest.raises(UserError, match="its grid is that of CT"):
        study.export("--channel", "PET", "--overwrite")


def test_objects_are_not_overwritten_unasked(study):
    study.predict(random_labels())
    study.export()
    before = study.object().SOPInstanceUID
    with pytest.raises(UserError, match="--overwrite"):
        study.export()
    assert study.object().SOPInstanceUID == before
    study.export("--overwrite")
    assert study.object().SOPInstanceUID != before

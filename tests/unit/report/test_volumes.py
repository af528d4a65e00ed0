"""Small copies of a case's volumes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.report import gather, read_views, volumes
from tests.unit.report.study import (
    CASES,
    CHANNELS,
    DATASET,
    LABEL,
    RATERS,
    SHAPE,
    box,
    rated,
    save,
    unfold,
    unzip,
    write_predictions,
)


class TestVolumes:
    @pytest.mark.parametrize("factors", [(1, 2, 3), (4, 4, 4), (1, 1, 1)])
    def test_shrinking_against_loops(self, factors):
        rng = np.random.default_rng(1)
        labels = rng.integers(0, 4, (5, 7, 8)).astype(np.uint8)
        image = rng.normal(size=labels.shape)
        shape = [-(-size // factor) for size, factor in zip(labels.shape, factors, strict=True)]
        small_image, small_labels = np.zeros(shape), np.zeros(shape)
        for index in np.ndindex(*shape):
            inside = [
                np.minimum(range(i * f, (i + 1) * f), size - 1)
                for i, f, size in zip(index, factors, labels.shape, strict=True)
            ]
            small_image[index] = image[np.ix_(*inside)].mean()
            small_labels[index] = np.bincount(labels[np.ix_(*inside)].ravel()).argmax()
        np.testing.assert_allclose(volumes.shrink_image(image, factors), small_image, atol=1e-6)
        np.testing.assert_array_equal(volumes.shrink_labels(labels, factors), small_labels)

    def test_the_finest_axes_are_shrunk_first(self):
        assert volumes.shrink_factors((10, 100, 100), (5, 1, 1), 30000) == (1, 2, 2)
        assert volumes.shrink_factors((10, 100, 100), (5, 1, 1), 100000) == (1, 1, 1)
        assert volumes.shrink_factors((1, 4, 4), (999, 1, 1), 1) == (1, 4, 4)

    @pytest.mark.parametrize(
        "direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, -1, 1, 0, 0, 0, -1, 0), (-1, 0, 0, 0, -1, 0, 0, 0, 1)]
    )
    @pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
    def test_patient_axes_are_those_of_simpleitk(self, tmp_path, direction, reader):
        array = np.arange(math.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
        save(tmp_path / "a.nii.gz", array, direction)
        expected = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(tmp_path / "a.nii.gz")), "LPS")
        data, properties = reader().read_images((str(tmp_path / "a.nii.gz"),))
        turned, grid = volumes.to_patient_axes(data[0], volumes.grid_of(data.shape[1:], properties))
        np.testing.assert_array_equal(turned, SimpleITK.GetArrayFromImage(expected))
        np.testing.assert_allclose(grid.spacing_mm, expected.GetSpacing()[::-1], atol=1e-5)
        voxel = (2, 3, 1)
        lps = expected.TransformIndexToPhysicalPoint(voxel)
        np.testing.assert_allclose(grid.affine @ [*voxel, 1], [-lps[0], -lps[1], lps[2], 1], atol=1e-4)

    def test_views_hold_the_volumes(self, study):
        found = gather.gather_study([study / "results"], study / "images", None)
        view = next(view for view in read_views(found, 2, 1.0) if view["case"] == "case_10")
        assert view["shape"] == view["original_shape"] == list(SHAPE)
        assert view["labels"] == [[LABEL, [1]]]
        assert [image["name"] for image in view["images"]] == list(CHANNELS)
        assert (view["images"][0]["low"], view["images"][0]["high"]) == (-75, 185)  # CT: of the plans
        run = view["runs"]["predictions"]
        np.testing.assert_array_equal(unzip(run["prediction"], SHAPE), box(1))
        np.testing.assert_array_equal(unzip(run["samples"], (2, *SHAPE)), [box(0), box(1)])
        np.testing.assert_array_equal(unzip(view["reference"], SHAPE), box(1))
        entropy = unfold(run["maps"][0]["data"], view)
        assert run["maps"][0]["high"] == pytest.approx(0.7)
        assert entropy[box(1) == 1].mean() > 200  # WebP loses a little
        assert entropy[box(1) == 0].mean() < 20
        ct = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(study / "images" / "case_10_0000.nii.gz")))
        grey = np.clip((ct + 75) / 260 * 255, 0, 255)
        assert np.abs(unfold(view["images"][0]["data"], view) - grey).mean() < 8

    def test_channels_of_the_same_name_are_all_there(self, study, tmp_path):
        write_predictions(tmp_path / "p", CASES[:1], samples=0)
        (tmp_path / "p" / "dataset.json").write_text(json.dumps({**DATASET, "channel_names": {"0": "MR", "1": "MR"}}))
        (view,) = read_views(gather.gather_study([tmp_path / "p"], study / "images", None), 0, 1.0)
        assert [image["name"] for image in view["images"]] == ["MR (0)", "MR (1)"]
        assert view["images"][0]["low"] == -75  # CT's, by its number

    def test_views_hold_the_raters_and_their_volumes(self, rated_study):
        found = gather.gather_study([rated_study / "results"], None, None)
        view = next(view for view in read_views(found, 0, 1.0) if view["case"] == "case_1")
        assert view["raters"] == list(RATERS)
        drawn = [rated(rater) for rater in RATERS]
        np.testing.assert_array_equal(unzip(view["rater_labels"], (2, *SHAPE)), drawn)
        assert view["rater_voxels"] == {LABEL: [own.sum() for own in drawn]}
        plain = replace(found, raters={})
        view = read_views(plain, 0, 1.0)[0]
        assert (view["raters"], view["rater_labels"], view["rater_voxels"]) == ([], None, {})

    def test_a_rater_who_ignores_everything_has_no_volume(self):
        raters = {"A": np.array([[[1, 1, 2, 0]]]), "B": np.array([[[9, 1, 1, 1]]]), "C": np.array([[[9, 9, 9, 9]]])}
        assert volumes._count(raters, {"x": (1,), "xy": (1, 2)}, 9) == {"x": [2, 3, None], "xy": [3, 3, None]}
        assert volumes._count(raters, {"x": (1,)}, None) == {"x": [2, 3, 0]}
        assert volumes._count({}, {"x": (1,)}, 9) == {}

    def test_maps_of_several_explanations_are_told_apart(self, study):
        found = gather.gather_study([study / "results"], None, None)
        (own,) = found.explanations
        more = {**own.maps["case_1"], "attribution: a": own.maps["case_1"]["complementary: CT_core_from_PET"]}
        both = replace(found, explanations=(own, replace(own, name="other", maps={"case_1": more})))
        assert set(volumes._explained(both, "case_1")) == {
            "complementary: CT_core_from_PET (explained)", "complementary: CT_core_from_PET (other)", "attribution: a",
        }  # fmt: skip

    def test_a_map_with_nan_is_refused(self, tmp_path):
        write_predictions(tmp_path / "p", CASES[:1])
        save(tmp_path / "p" / "uncertainty" / f"{CASES[0]}_entropy.nii.gz", np.full(SHAPE, np.nan, np.float32))
        with pytest.raises(UserError, match=r"entropy.nii.gz: NaN in 720 voxels"):
            read_views(gather.gather_study([tmp_path / "p"], None, None), 0, 1.0)

    def test_views_are_no_larger_than_they_may_be(self):
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(20, 32, 32)).astype(np.float32)
        grid = volumes.Grid(noise.shape, np.diag([1.0, 1, 1, 1]), True)
        case = volumes.CaseVolumes("c", grid, {"x": (1,)}, {"a": noise}, {"a": (-2.0, 2.0)}, None, {}, {})
        drawn = [(noise > threshold).astype(np.uint8) for threshold in (0, 0.1, 0.2, 0.3)]
        run = volumes.Drawn(drawn[0], (), {})
        case = replace(case, runs={"r": run}, raters=dict(zip("ABC", drawn[1:], strict=True)))
        free, bound = (volumes.encode_case(case, size) for size in (1e9, 7e3))
        assert free["shape"] == [20, 32, 32]
        assert len(json.dumps(bound)) <= 7e3 < len(json.dumps(free))
        centre = np.array(bound["affine"]) @ [0, 0, 0, 1]  # of the first block: the mean of its voxels
        factors = np.array(free["shape"]) / bound["shape"]
        np.testing.assert_allclose(centre[:3], (np.ceil(factors) - 1)[::-1] / 2)

    def test_other_grids_are_refused(self, study, tmp_path):
        write_predictions(tmp_path / "p")
        (tmp_path / "labels").mkdir()
        for case in CASES:
            image = SimpleITK.GetImageFromArray(box(0))
            SimpleITK.WriteImage(image, str(tmp_path / "labels" / f"{case}.nii.gz"))
        with pytest.raises(UserError, match=r"spacing.*must be on one grid"):
            read_views(gather.gather_study([tmp_path / "p"], None, tmp_path / "labels"), 1, 1)

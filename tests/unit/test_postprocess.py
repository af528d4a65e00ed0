import json

import numpy as np
import pytest
import SimpleITK

from nnunet_multimodal import cli
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.postprocess import parse_rule, replace_small

LABELS = {"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]}


def test_a_label_below_the_limit_becomes_the_other_one():
    label_map = np.array([[0, 1, 3], [3, 2, 2]])
    assert replace_small(label_map, 3, 1, below=3).tolist() == [[0, 1, 1], [1, 2, 2]]
    assert replace_small(label_map, 3, 1, below=2) is None
    assert replace_small(np.zeros((2, 2)), 3, 1, below=9) is None


def test_rules_take_names_or_numbers():
    assert parse_rule("enhancing=necrosis", LABELS) == (3, 1)
    assert parse_rule("3=1", REGIONS) == (3, 1)
    for rule in ("enhancing", "enhancing=whole", "tumour=necrosis", "9=1", "3=3", "1=2=3"):
        with pytest.raises(UserError, match=r"is not LABEL=OTHER with two of background, .*0, 1, 2, 3"):
            parse_rule(rule, LABELS)
    with pytest.raises(UserError):
        parse_rule("enhancing=1", REGIONS)  # a region's name is no label


@pytest.fixture
def predictions(tmp_path):
    folder = tmp_path / "predictions"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".nii.gz"}))
    (folder / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))
    for case, count in (("few", 4), ("many", 40)):
        array = np.zeros((4, 5, 6), np.uint8)
        array.flat[:count] = 3
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing((1.0, 2.0, 3.0))
        SimpleITK.WriteImage(image, str(folder / f"{case}.nii.gz"))
    return folder


def test_the_command_writes_a_folder_that_can_be_evaluated(predictions, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["-i", str(predictions), "-o", str(output), "--small", "enhancing=necrosis", "--below", "10"]
    assert cli.main(["postprocess", *flags]) == 0
    few, many = (SimpleITK.ReadImage(str(output / f"{case}.nii.gz")) for case in ("few", "many"))
    assert np.bincount(SimpleITK.GetArrayFromImage(few).ravel()).tolist() == [116, 4]
    assert few.GetSpacing() == (1.0, 2.0, 3.0)
    same = (SimpleITK.ReadImage(str(predictions / "many.nii.gz")), many)
    assert np.array_equal(*map(SimpleITK.GetArrayFromImage, same))
    assert many.GetSize() == (6, 5, 4)
    assert sorted(p.name for p in output.iterdir()) == ["dataset.json", "few.nii.gz", "many.nii.gz", "plans.json"]
    assert "1 of 2 cases changed: few.nii.gz" in capsys.readouterr().out


def test_documented_commands(documented, predictions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documented.run(lambda command: cli.main(command[1:]))
    for case, count in (("few", 4), ("many", 40)):
        processed = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "processed" / f"{case}.nii.gz")))
        assert np.bincount(processed.ravel()).tolist() == [120 - count, count]  # both have fewer than 500 voxels


def test_what_does_not_fit_is_refused(predictions, tmp_path):
    base = ["postprocess", "--small", "enhancing=necrosis"]
    with pytest.raises(UserError, match="another folder for the results"):
        cli.main([*base, "-i", str(predictions), "-o", str(predictions)])
    with pytest.raises(UserError, match="must be at least 1"):
        cli.main([*base, "-i", str(predictions), "-o", str(tmp_path / "out"), "--below", "0"])
    (predictions / "plans.json").unlink()
    with pytest.raises(UserError, match=r"plans.json is not there; nnUNetv2_predict writes it"):
        cli.main([*base, "-i", str(predictions), "-o", str(tmp_path / "out")])

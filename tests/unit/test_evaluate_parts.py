"""Parts of a folder: put together they are the evaluation in one call, byte for byte."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from nnunet_multimodal.cli import main
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate.parts import Parts
from tests.unit.test_evaluate import blobs, describe, save

CASES = "abcdefg"  # 7 cases: 3 parts of 3, 2, 2


@pytest.fixture
def folders(tmp_path):
    """A folder of predictions with something wrong in two cases: in the means of a part, and left out."""
    gt, pred = tmp_path / "gt", tmp_path / "pred"
    describe(pred)
    for seed, case in enumerate(CASES):
        save(gt / f"{case}.nii.gz", blobs(seed))
        save(pred / f"{case}.nii.gz", blobs(100 + seed))
    save(pred / "b.nii.gz", np.minimum(blobs(1), 1))  # HD95 of the lesion is inf
    save(pred / "e.nii.gz", blobs(4), origin=(0, 0, 0))
    save(pred / "z.nii.gz", blobs(0))  # no reference
    return gt, pred


def evaluate(folders, *flags):
    return main(["evaluate", *map(str, folders), "-np", "1", *map(str, flags)])


def part(folders, number, index, *flags):
    return evaluate(folders, "-num_parts", number, "-part_id", index, *flags)


def results(folder):
    """What was written, as bytes."""
    return {file.name: file.read_bytes() for file in folder.glob("evaluation*") if file.is_file()}


def in_one(folders, *flags):
    """The evaluation in one call, taken away again."""
    assert evaluate(folders, *flags) == 0
    found = results(folders[1])
    for name in found:
        (folders[1] / name).unlink()
    return found


def add_samples(folders):
    """Samples with weights of all cases but one, probabilities of all but another one."""
    rng = np.random.default_rng(0)
    for seed, case in enumerate(CASES):
        if case != "c":
            for i in range(3):
                save(folders[1] / "samples" / f"{case}__{i:03d}.nii.gz", blobs(200 + 10 * seed + i))
            weights = rng.dirichlet((1, 1, 1)).tolist()
            (folders[1] / f"{case}.json").write_text(json.dumps({"samples": 3, "sample_weights": weights}))
        if case != "d":
            p = rng.dirichlet((1, 1, 1), (8, 10, 12)).transpose(3, 0, 1, 2).astype(np.float32)
            np.savez_compressed(folders[1] / f"{case}.npz", probabilities=p)


def add_raters(folders):
    raters = folders[0].parent / "raters"
    for seed, case in enumerate(CASES[:-1]):  # the last one has none
        for i, name in enumerate(("jo", "kim", "lee")):
            save(raters / f"{case}__{name}.nii.gz", blobs(300 + 10 * seed + i))
    (raters / "raters.csv").write_text("case,rater,weight\na,jo,2.5\nb,kim,0\n")
    return "--raters", raters


@pytest.mark.parametrize("content", ["plain", "samples", "raters", "samples and raters"])
@pytest.mark.parametrize(("number", "order"), [(3, (2, 0, 1)), (9, range(9))])
def test_parts_are_the_evaluation_in_one_call(folders, content, number, order, capsys):
    if "samples" in content:
        add_samples(folders)
    flags = add_raters(folders) if "raters" in content else ()
    if content == "samples and raters":
        (folders[1] / "c.nii.gz").unlink()  # the one without samples
        flags = (*flags, "--chill", "--samples", 2, 3)
    expected = in_one(folders, *flags)
    assert ("count" in expected["evaluation.json"].decode()) == ("samples" in content)
    assert ("evaluation_reliability.png" in expected) == ("samples" in content)
    assert ("evaluation_agreement.csv" in expected) == ("raters" in content)
    printed = capsys.readouterr().out
    for index in order:
        assert not (folders[1] / "evaluation.json").exists()
        assert part(folders, number, index, *flags) == 0
    assert results(folders[1]) == expected
    assert capsys.readouterr().out.endswith(printed)
    for name in expected:
        (folders[1] / name).unlink()
    assert evaluate(folders, "-num_parts", number, "--merge", *flags) == 0
    assert results(folders[1]) == expected


@pytest.mark.parametrize("number", [2])
def test_parts_of_raters_without_a_reference(folders, number, capsys):
    shutil.rmtree(folders[0])
    _, raters = add_raters(folders)
    gt_and_pred, flags = (raters, folders[1]), ("--samples", 2)
    add_samples(folders)
    (folders[1] / "c.nii.gz").unlink()
    expected = in_one(gt_and_pred, "--chill", *flags)
    assert "GED2_2" in expected["evaluation.csv"].decode()
    for index in range(number):
        part(gt_and_pred, number, index, "--chill", *flags)
    assert results(folders[1]) == expected
    with pytest.raises(UserError, match="was measured with other first\n"):
        evaluate(gt_and_pred, "-num_parts", number, "--merge", "--chill", "--samples", 3)


def test_every_case_is_measured_in_one_part(folders):
    for index in range(3):
        part(folders, 3, index)
    content = [json.loads((folders[1] / f"evaluation.parts/{i}_of_3.json").read_text()) for i in range(3)]
    assert [len(c["results"]) for c in content] == [3, 2, 2]
    assert sorted(file.name for file in (folders[1] / "evaluation.parts").iterdir()) == [
        f"{i}_of_3.json" for i in range(3)
    ]


def test_a_part_that_runs_twice_counts_once(folders, capsys):
    expected = in_one(folders)
    for index in (0, 0, 1):
        part(folders, 3, index)
        assert "part 2: there is no " in capsys.readouterr().out
    assert not (folders[1] / "evaluation.json").exists()
    part(folders, 3, 2)
    assert results(folders[1]) == expected
    part(folders, 3, 1)
    assert results(folders[1]) == expected


def test_merging_names_the_parts_that_are_missing(folders, capsys):
    part(folders, 4, 1)
    told = capsys.readouterr().out
    assert "part 1 of 4: 2 cases measured" in told
    with pytest.raises(UserError) as error:
        evaluate(folders, "-num_parts", 4, "--merge")
    for index in range(4):
        reason = f"part {index}: there is no {folders[1]}/evaluation.parts/{index}_of_4.json"
        assert (reason in str(error.value)) == (reason in told) == (index != 1)
    assert not (folders[1] / "evaluation.json").exists()
    with pytest.raises(UserError, match=r"part 0: .*0_of_2\.json"):  # other numbers of parts do not count
        evaluate(folders, "-num_parts", 2, "--merge")


def test_parts_of_other_settings_or_files_are_refused(folders, capsys):
    part(folders, 2, 0, "--tolerance_mm", 2)
    capsys.readouterr()
    part(folders, 2, 1)
    assert "0_of_2.json was measured with other tolerance_mm\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"part 0: .*0_of_2\.json was measured with other tolerance_mm\n"):
        evaluate(folders, "-num_parts", 2, "--merge")
    part(folders, 2, 0)
    assert (folders[1] / "evaluation.json").exists()

    save(folders[1] / "g.nii.gz", blobs(999))  # a new prediction of a case of part 0
    os.utime(folders[1] / "g.nii.gz", (1, 1))
    with pytest.raises(UserError, match=r"part 0: .* other files\npart 1: .* other files\n"):
        evaluate(folders, "-num_parts", 2, "--merge")
    expected = in_one(folders)
    for index in (0, 1):
        assert not (folders[1] / "evaluation.json").exists()
        part(folders, 2, index)
    assert results(folders[1]) == expected

    shutil.copy(folders[1] / "evaluation.parts/0_of_2.json", folders[1] / "evaluation.parts/1_of_2.json")
    with pytest.raises(UserError, match=r"part 1: .*1_of_2\.json was measured with other part\n"):
        evaluate(folders, "-num_parts", 2, "--merge")
    (folders[1] / "evaluation.parts/1_of_2.json").write_text("{")
    with pytest.raises(UserError, match=r"part 1: .*1_of_2\.json cannot be read"):
        evaluate(folders, "-num_parts", 2, "--merge")


def test_folders_may_lie_elsewhere_on_another_machine(folders, tmp_path):
    part(folders, 2, 0)
    elsewhere = tmp_path / "mount"
    elsewhere.symlink_to(tmp_path)
    there = [elsewhere / folder.name for folder in folders]
    expected = in_one(there)
    part(there, 2, 1)
    assert results(folders[1]) == expected


def test_parts_that_finish_together_lose_nothing(folders, monkeypatch):
    """Each is written before the other one looks, and both put them together."""
    expected = in_one(folders)
    read, seen = Parts.read, []

    def read_after_the_other_part(self, num_cases):
        monkeypatch.setattr(Parts, "read", read)
        part(folders, 2, 1)
        seen.append(results(folders[1]))
        return read(self, num_cases)

    monkeypatch.setattr(Parts, "read", read_after_the_other_part)
    part(folders, 2, 0)
    assert [*seen, results(folders[1])] == [expected, expected]


def test_a_part_that_is_killed_while_it_writes_is_not_there(folders):
    expected = in_one(folders)
    part(folders, 2, 0)
    command = [sys.executable, "-m", "tests.killed_worker", "nnunet-multimodal", "evaluate", *map(str, folders)]
    flags = ["-np", "1", "-num_parts", "2", "-part_id", "1"]
    environment = {**os.environ, "KILL_AT": "replace 1"}
    killed = subprocess.run([*command, *flags], env=environment, start_new_session=True, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(UserError, match="part 1: there is no "):
        evaluate(folders, "-num_parts", 2, "--merge")
    part(folders, 2, 1)
    assert results(folders[1]) == expected


def test_missing_predictions_are_refused_by_every_part_unless_chilled(folders):
    (folders[1] / "b.nii.gz").unlink()
    with pytest.raises(SystemExit, match=r"(?s)no prediction: b\n.*--chill"):
        part(folders, 2, 0)
    assert not (folders[1] / "evaluation.parts").exists()
    expected = in_one(folders, "--chill")
    for index in (0, 1):
        part(folders, 2, index, "--chill")
    assert results(folders[1]) == expected


def test_flags_that_do_not_fit_are_refused(folders):
    with pytest.raises(UserError, match="-part_id 2 must be at least 0 and less than -num_parts 2"):
        part(folders, 2, 2)
    with pytest.raises(UserError, match="--merge puts parts together; say with -num_parts"):
        evaluate(folders, "--merge")
    with pytest.raises(UserError, match="--merge has no meaning with --all-subsets"):
        evaluate(folders, "--merge", "--all-subsets", "-i", "i", "-d", 1, "-c", "2d", "-tr", "nnUNetTrainer")

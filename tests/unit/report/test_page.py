"""The text of the page."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markupsafe import escape
from PIL import Image

from nnunet_multimodal.cli import main
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate.agreement import HEADINGS as AGREEMENT_HEADINGS
from nnunet_multimodal.evaluate.report import HEADINGS
from nnunet_multimodal.report import gather, page, read_views
from tests.unit.report.study import (
    CASES,
    DATASET,
    LABEL,
    PLANS,
    RATERS,
    SHAPE,
    SPACING_MM,
    WellFormed,
    box,
    json_of,
    make_flat,
    rated,
    save,
    unzip,
    write_model,
    write_predictions,
)


class TestPage:
    def test_is_well_formed_and_needs_nothing_else(self, written):
        parsed = WellFormed(written)
        assert len(set(parsed.ids)) == len(parsed.ids)
        assert all(link.startswith(("data:", "#")) for link in parsed.links)
        for anchor in (link[1:] for link in parsed.links if link.startswith("#")):
            assert anchor in parsed.ids
        assert "secret-host" not in written
        assert str(Path.home()) not in written

    def test_text_of_names_is_escaped(self, written):
        assert LABEL in WellFormed(written).text
        assert "<b>" not in re.sub(r"<script.*?</script>", "", written, flags=re.S)

    def test_json_cannot_end_its_element(self):
        content = {"</script><script>alert(1)</script>": ["<!--", "&", "\u2028", math.nan, (1, 2)]}
        text = str(page.safe_json(content))
        assert not set(text) & {"<", ">", "&", "\u2028"}
        assert json.loads(text) == {"</script><script>alert(1)</script>": ["<!--", "&", "\u2028", None, [1, 2]]}

    def test_numbers_are_those_of_the_files(self, written, study):
        table = pd.read_csv(study / "results" / "predictions" / "evaluation.csv").set_index(["case", "label"])
        rows = re.findall(r'<tr data-case="(\S+)" data-run="predictions"[^>]*>(.*?)</tr>', written, flags=re.S)
        assert [case for case, _ in rows] == sorted(CASES)
        for case, cells in rows:
            dice = float(re.search(r'data-value="([^"]*)" data-dice', cells)[1])
            assert dice == pytest.approx(table.loc[(case, LABEL), "Dice"])
            assert "PET" in cells if case == "case_2" else "PET" not in cells
        (data,) = json_of(written, 'id="data"')
        own = data["cases"]["case_1"]["runs"]["predictions"]
        voxel_ml = math.prod(SPACING_MM) / 1000
        assert own["references"][LABEL] == pytest.approx(box(1).sum() * voxel_ml)
        assert own["labels"][LABEL]["volume_ml"]["prediction"] == pytest.approx(box(0).sum() * voxel_ml)
        changed = re.search(
            r">CT</th>.*?<td class=\"n\">2</td><td class=\"n\">(\S+)</td>.*?<td class=\"n\">(\S+)</td>", written, re.S
        )
        assert changed.groups() == ("0.500", "0.125")
        means = [f"{0.5 + 0.1 * model + 0.05 * subset:.3f}" for subset in range(3) for model in range(2)]
        cells = re.findall(r">(0\.\d{3}).?<small>(\S+) to (\S+)</small>", written)
        assert cells[:6] == [(mean, mean, mean) for mean in means]  # all cases have the same

    def test_what_the_evaluation_tells_of_raters(self, rated_study):
        found = gather.gather_study([rated_study / "results"], None, None)
        text = page.render(found, read_views(found, 1, 1.0), "raters")
        table = pd.read_csv(rated_study / "results" / "predictions" / "evaluation.csv").set_index(["case", "label"])
        (data,) = json_of(text, 'id="data"')
        own = data["cases"]["case_1"]["runs"]["predictions"]
        assert own["raters"][LABEL] == pytest.approx([rated(r).sum() * math.prod(SPACING_MM) / 1000 for r in RATERS])
        ((label, values),) = own["distribution"]["rows"]
        assert label == LABEL
        row = dict(zip(own["distribution"]["columns"], values, strict=True))
        assert {"GED²", "rater Dice", "raters' own", "within", "covered"} <= row.keys()
        for column, heading in HEADINGS.items():
            if heading in row:
                assert row[heading] == pytest.approx(table.loc[("case_1", LABEL), column])
        means = WellFormed(text).text
        for column in ("rater_Dice", "interrater_Dice", "M_IoU"):
            assert f"{table.loc[('mean', LABEL), column]:.3f}" in means
        assert "raters' own: Dice of the raters with one another" in means

    def test_agreement_with_every_rater(self, rated_study):
        found = gather.gather_study([rated_study / "results"], None, None)
        file = rated_study / "results" / "predictions" / "evaluation_agreement.csv"
        table = pd.read_csv(file).set_index(["case", "label", "rater"])
        (group,) = page.agreement_table(found)
        assert [(label, rater, cases) for label, rater, cases, _ in group["rows"]] == [(LABEL, r, 2) for r in RATERS]
        for label, rater, _, values in group["rows"]:
            assert values == pytest.approx(table.loc[("mean", label, rater), list(AGREEMENT_HEADINGS)].tolist())
        own = page.agreement(found.predictions[0], "case_1")
        assert own["columns"] == list(AGREEMENT_HEADINGS.values())
        assert [(label, rater) for label, rater, _ in own["rows"]] == [(LABEL, rater) for rater in RATERS]
        for label, rater, values in own["rows"]:
            assert values == pytest.approx(table.loc[("case_1", label, rater), list(AGREEMENT_HEADINGS)].tolist())
        assert "Agreement with every rater" in WellFormed(page.render(found, read_views(found, 0, 0.1), "raters")).text

    def test_without_the_table_of_raters_there_are_the_means(self, rated_study, tmp_path):
        content = (rated_study / "results" / "predictions" / "evaluation.json").read_text()
        (tmp_path / "e.json").write_text(content)
        found = gather.gather_study([tmp_path / "e.json"], None, None)
        assert len(page.agreement_table(found)[0]["rows"]) == len(RATERS)
        assert page.agreement(found.predictions[0], "case_1") is None

    def test_measures_of_the_first_samples_stand_beside_those_of_all(self, study):
        (run,) = gather.gather_study([study / "results"], None, None).predictions
        mean = {LABEL: {"GED2": 0.5, "GED2_16": 0.6, "GED2_100": 0.55, "volume_CRPS_16": 3.0, "M_IoU": 0.7}}
        found = gather.Study(predictions=(replace(run, evaluation=replace(run.evaluation, mean=mean)),))
        assert page.distribution_columns(found) == ["GED2", "GED2_16", "GED2_100", "M_IoU"]
        assert page.headings(found)["GED2_16"] == "GED² 16"

    def test_raters_columns_are_there_with_several_raters_alone(self, study, rated_study):
        one, several = (gather.gather_study([root / "results"], None, None) for root in (study, rated_study))
        assert not set(page.RATER_COLUMNS) & set(page.case_columns(one))
        assert set(page.RATER_COLUMNS) <= set(page.case_columns(several))

    def test_the_tolerance_is_told_where_it_is_one(self, study):
        (run,) = gather.gather_study([study / "results"], None, None).predictions
        other = replace(run, name="other", evaluation=replace(run.evaluation, tolerance_mm=2.0))
        assert page.headings(gather.Study(predictions=(run,)))["NSD"] == "NSD 1 mm"
        assert page.headings(gather.Study(predictions=(run, other)))["NSD"] == "NSD"

    def test_sections_without_results_say_so(self, tmp_path, capsys):
        write_predictions(tmp_path / "p", samples=0)
        assert main(["report", str(tmp_path / "p"), "-o", str(tmp_path / "r.html")]) == 0
        text = re.sub(r"\s+", " ", WellFormed((tmp_path / "r.html").read_text()).text)
        for sentence in (
            "No evaluation of the predictions", "No trained model was named", "No table of subsets",
            "No measures of samples", "No volumes with intervals", "No reliability curves",
            "No explanation of the predictions", "No training log", "No images are shown",
            "No references are shown",
        ):  # fmt: skip
            assert sentence in text
        assert "3 cases" in capsys.readouterr().out

    def test_numbers_that_are_none(self, tmp_path):
        write_predictions(tmp_path / "p", CASES[:1])
        file = tmp_path / "p" / f"{CASES[0]}.json"
        summary = json.loads(file.read_text())
        summary["labels"][LABEL]["volume_ml"]["p2.5"] = math.nan
        summary["sample_weights"] = [math.nan, 1.0, math.inf]
        file.write_text(json.dumps(summary))
        assert main(["report", str(tmp_path / "p"), "-o", str(tmp_path / "r.html")]) == 0
        text = (tmp_path / "r.html").read_text()
        (data,) = json_of(text, 'id="data"')
        own = data["cases"][CASES[0]]["runs"]["p"]
        assert own["weights"] == [None, 1.0, None]
        assert own["labels"][LABEL]["volume_ml"]["p2.5"] is None
        assert 'data-value="nan"' not in text

    def test_a_model_alone(self, tmp_path):
        write_model(tmp_path / "T__nnUNetPlans__3d_fullres")
        assert main(["report", str(tmp_path / "T__nnUNetPlans__3d_fullres"), "-o", str(tmp_path / "r.html")]) == 0
        text = (tmp_path / "r.html").read_text()
        assert "No pictures" in WellFormed(text).text
        assert 'id="viewer-code"' not in text
        assert "0.625" in text

    def test_images_of_other_cases(self, tmp_path):
        write_predictions(tmp_path / "p", samples=0)
        save(tmp_path / "images" / "somebody_0000.nii.gz", np.zeros(SHAPE, np.float32))
        arguments = ["report", str(tmp_path / "p"), "-i", str(tmp_path / "images"), "-o", str(tmp_path / "r.html")]
        assert main(arguments) == 0
        assert "or none are of these cases" in WellFormed((tmp_path / "r.html").read_text()).text

    def test_2d_images_without_a_physical_size(self, tmp_path):
        folder = tmp_path / "p"
        folder.mkdir()
        (folder / "dataset.json").write_text(json.dumps({**DATASET, "file_ending": ".png"}))
        (folder / "plans.json").write_text(json.dumps({**PLANS, "image_reader_writer": "NaturalImage2DIO"}))
        array = np.zeros((30, 40), np.uint8)
        array[5:10, 5:25] = 1
        Image.fromarray(array).save(folder / "a.png")
        (view,) = read_views(gather.gather_study([folder], None, None), 1, 1)
        assert view["shape"] == [1, 30, 40]
        assert not view["oriented"]
        np.testing.assert_array_equal(unzip(view["runs"]["p"]["prediction"], (30, 40)), array)

    def test_volumes_without_a_physical_size(self, tmp_path):
        make_flat(tmp_path)
        flags = ["-np", "1", "--raters", str(tmp_path / "raters")]
        assert main(["evaluate", str(tmp_path / "labels"), str(tmp_path / "p"), *flags]) == 0
        assert main(["report", str(tmp_path / "p"), "-o", str(tmp_path / "r.html")]) == 0
        text = (tmp_path / "r.html").read_text()
        (data,) = json_of(text, 'id="data"')
        own = data["cases"]["a"]["runs"]["p"]
        assert (data["unit"], own["references"], own["raters"]) == ("voxels", {LABEL: 100}, {LABEL: [100, 60]})
        assert own["labels"][LABEL]["voxels"]["prediction"] == 80
        assert "volume (voxels)" in text
        assert f"Predicted against reference volume of {escape(LABEL)}" in text
        assert "the patient's left" not in text

    def test_a_page_is_not_overwritten_without_the_flag(self, study, tmp_path):
        file = tmp_path / "r.html"
        file.write_text("mine")
        arguments = ["report", str(study / "results"), "-o", str(file), "--megabytes", "0.1"]
        with pytest.raises(UserError, match="--overwrite"):
            main(arguments)
        assert file.read_text() == "mine"
        assert main([*arguments, "--overwrite"]) == 0
        assert file.read_text() != "mine"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["-o", "r.txt"], "ends in .html"),
            (["-o", "r.html", "--samples", "-1"], "--samples"),
            (["-o", "r.html", "--megabytes", "0"], "--megabytes"),
        ],
    )
    def test_flags_out_of_range(self, study, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=message):
            main(["report", str(study / "results"), *arguments])
        assert not list(tmp_path.iterdir())

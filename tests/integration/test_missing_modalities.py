"""Incomplete cases from their files to a prediction, every step of nnU-Net's by its own command."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK
import torch

from nnunet_multimodal import cli
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.modalities import split_present
from nnunet_multimodal.preprocessing import PLACEHOLDER
from tests.contracts import interrupt_second_epoch
from tests.nnunet import DATASET, PLANS, NnUNet, make_dataset, remove_channels, segmentation, write_raw

ABSENT = {0: (1,), 1: (0, 2), 3: (2,), 4: (0,)}
TRAINER = "ShaSpecModalityDropoutTrainer_1epoch_2iterations"
FPE = ("-fpe", "MultimodalFingerprintExtractor")


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory):
    """Five cases of which one is complete, planned and preprocessed."""
    return make_dataset(tmp_path_factory.mktemp("incomplete"), "labels", absent=ABSENT)


def fingerprint(nnunet):
    return json.loads((nnunet.preprocessed / DATASET / "dataset_fingerprint.json").read_text())


def preprocessed(nnunet, case, configuration="3d_fullres"):
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    folder = nnunet.preprocessed / DATASET / f"{PLANS}_{configuration}"
    data, seg, _, properties = nnUNetDatasetBlosc2(str(folder)).load_case(f"case_{case}")
    return data[:], seg[:], properties


# --- without absent modalities


@pytest.mark.parametrize("processes", [1, 2])
def test_the_fingerprint_of_complete_cases_is_nnunets(tmp_path, processes):
    nnunet = NnUNet(tmp_path)
    write_raw(nnunet, "labels")
    nnunet("nnUNetv2_extract_fingerprint", "-d", 900, "-np", 1, "--clean")
    stock = (nnunet.preprocessed / DATASET / "dataset_fingerprint.json").read_bytes()
    nnunet("nnUNetv2_extract_fingerprint", "-d", 900, "-np", processes, "--clean", *FPE)
    assert (nnunet.preprocessed / DATASET / "dataset_fingerprint.json").read_bytes() == stock


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres", "3d_lowres"])
def test_complete_cases_are_preprocessed_as_by_nnunet(datasets, tmp_path, configuration):
    stock = datasets("labels")
    ours = NnUNet(tmp_path)
    shutil.copytree(stock.raw / DATASET, ours.raw / DATASET)
    shutil.copytree(
        stock.preprocessed / DATASET, ours.preprocessed / DATASET, ignore=shutil.ignore_patterns(f"{PLANS}_*")
    )
    plans = ours.plans()
    for changed in plans["configurations"].values():
        if "preprocessor_name" in changed:
            changed["preprocessor_name"] = "MultimodalPreprocessor"
    ours.write_plans(plans)
    ours("nnUNetv2_preprocess", "-d", 900, "-plans_name", PLANS, "-c", configuration, "-np", 1)
    for case in range(5):
        for a, b in zip(preprocessed(stock, case, configuration), preprocessed(ours, case, configuration), strict=True):
            if isinstance(a, dict):
                assert a["bbox_used_for_cropping"] == b["bbox_used_for_cropping"]
            else:
                assert a.dtype == b.dtype
                assert np.array_equal(a, b)


# --- planning and preprocessing


def test_absent_channels_do_not_enter_the_statistics(incomplete, tmp_path):
    """Those of a channel are nnU-Net's own over the cases that have it."""
    ours = fingerprint(incomplete)
    assert ours["nnunet_multimodal"] == {"cases": 5, "cases_with_channel": [3, 4, 3]}
    for channel in range(3):
        having = [case for case in range(5) if channel not in ABSENT.get(case, ())]
        (tmp_path / str(channel)).mkdir()
        alone = NnUNet(tmp_path / str(channel))
        write_raw(alone, "labels")
        for file in (alone.raw / DATASET).rglob("case_*"):
            if int(file.name.split("_")[1].split(".")[0]) not in having:
                file.unlink()
        alone("nnUNetv2_extract_fingerprint", "-d", 900, "-np", 1)
        expected = fingerprint(alone)["foreground_intensity_properties_per_channel"][str(channel)]
        found = ours["foreground_intensity_properties_per_channel"][str(channel)]
        # nnU-Net draws with replacement, other numbers for other sets of cases; extremes are hit by all
        assert found == pytest.approx(expected, rel=0.02, abs=0.03)
        assert found["max"] < 10 < PLACEHOLDER


def test_placeholders_do_not_enter_the_crop(tmp_path):
    nnunet = NnUNet(tmp_path)
    write_raw(nnunet, "labels", cases=2)
    images = nnunet.raw / DATASET / "imagesTr"
    for file in images.iterdir():  # nothing but zeros around the images' content
        image = SimpleITK.ReadImage(str(file))
        array = SimpleITK.GetArrayFromImage(image)
        array[:3] = array[-4:] = 0
        changed = SimpleITK.GetImageFromArray(array)
        changed.CopyInformation(image)
        SimpleITK.WriteImage(changed, str(file))
    remove_channels(images, {0: (0,)})
    assert cli.main(["complete", str(images), "-np", "1"]) == 0
    nnunet("nnUNetv2_extract_fingerprint", "-d", 900, "-np", 1, *FPE)
    assert fingerprint(nnunet)["shapes_after_crop"] == [[11, 20, 22]] * 2


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres", "3d_lowres"])
def test_absent_channels_are_nan_and_the_others_as_if_they_were_not(incomplete, configuration):
    stock = make_stock_preprocessor(incomplete, configuration)
    for case in range(5):
        data, seg, properties = preprocessed(incomplete, case, configuration)
        gone = ABSENT.get(case, ())
        expected, expected_seg = stock(case, gone)
        for channel in range(3):
            if channel in gone:
                assert np.isnan(data[channel]).all()
            else:
                assert np.array_equal(data[channel], expected[channel])
        assert np.array_equal(seg, expected_seg)
        assert set(properties["class_locations"]) == {1, 2}


def make_stock_preprocessor(nnunet, configuration):
    """nnU-Net's own preprocessing of a case with zeros in place of what is absent."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(nnunet.plans())
    dataset_json = json.loads((nnunet.raw / DATASET / "dataset.json").read_text())

    def run(case, gone):
        folder = nnunet.raw / DATASET
        reader = plans.image_reader_writer_class()
        files = [str(folder / "imagesTr" / f"case_{case}_{channel:04d}.nii.gz") for channel in range(3)]
        data, properties = reader.read_images(files)
        data[list(gone)] = 0
        seg, _ = reader.read_seg(str(folder / "labelsTr" / f"case_{case}.nii.gz"))
        preprocessor = DefaultPreprocessor(verbose=False)
        configuration_ = plans.get_configuration(configuration)
        return preprocessor.run_case_npy(data, seg, properties, plans, configuration_, dataset_json)[:2]

    return run


def test_a_case_without_any_and_nan_are_refused_with_their_files(incomplete, tmp_path):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(incomplete.plans())
    configuration = plans.get_configuration("3d_fullres")
    preprocessor = configuration.preprocessor_class(verbose=False)
    files = [str(tmp_path / f"x_{channel:04d}.nrrd") for channel in range(3)]
    for array, message in (
        (np.full((4, 5, 6), PLACEHOLDER, np.float32), r"x_0000.nrrd[\s\S]*no modality is there"),
        (np.full((4, 5, 6), np.nan, np.float32), r"x_0000.nrrd[\s\S]*NaN in 360 voxels"),
    ):
        for file in files:
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), file)
        with pytest.raises(UserError, match=message):
            preprocessor.run_case(files, None, plans, configuration, {})
    with pytest.raises(
        UserError, match=r"x_0002.nrrd: .*2 of 3 modalities; complete the folder with nnunet-multimodal"
    ):
        preprocessor.run_case([files[0], files[2]], None, plans, configuration, {})


def test_a_folder_that_was_not_completed_is_refused_with_the_remedy(tmp_path):
    nnunet = NnUNet(tmp_path)
    write_raw(nnunet, "labels", cases=2)
    images = nnunet.raw / DATASET / "imagesTr"
    remove_channels(images, {0: (1,)})
    with pytest.raises(
        UserError, match=rf"case_0_0002.nii.gz: 2 of 3 modalities; .* nnunet-multimodal complete {images}"
    ):
        nnunet("nnUNetv2_extract_fingerprint", "-d", 900, "-np", 1, *FPE)


def test_plans_that_take_placeholders_for_images_are_refused(tmp_path):
    nnunet = NnUNet(tmp_path)
    write_raw(nnunet, "labels")
    images = nnunet.raw / DATASET / "imagesTr"
    remove_channels(images, ABSENT)
    cli.main(["complete", str(images), "-np", "1"])
    nnunet("nnUNetv2_extract_fingerprint", "-d", 900, "-np", 1)
    plan = ("nnUNetv2_plan_experiment", "-d", 900, "-gpu_memory_target", 0.005)
    what = rf"4 cases of {DATASET} lack modalities \(.*modalities.csv\), and "
    remedy = r".*-fpe MultimodalFingerprintExtractor -preprocessor_name MultimodalPreprocessor"
    with pytest.raises(UserError, match=what + "its fingerprint was taken of their placeholders" + remedy):
        nnunet(*plan, "-pl", "nnUNetPlannerShaSpec", nnUNet_n_proc_DA="1")
    nnunet("nnUNetv2_extract_fingerprint", "-d", 900, "-np", 1, "--clean", *FPE)
    nnunet(*plan, "-pl", "nnUNetPlannerTiny", nnUNet_n_proc_DA="1")
    trainer = nnunet.trainer(TRAINER)
    with (
        nnunet.environment(),
        pytest.raises(UserError, match=what + "DefaultPreprocessor takes their placeholders for images" + remedy),
    ):
        trainer.initialize()
    nnunet(*plan, "-pl", "nnUNetPlannerShaSpec", nnUNet_n_proc_DA="1")
    configurations = nnunet.plans("nnUNetShaSpecPlans")["configurations"]
    assert configurations["3d_fullres"]["preprocessor_name"] == "MultimodalPreprocessor"


# --- training


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_augmentation_keeps_them_absent_and_the_others_finite(incomplete, configuration):
    trainer = incomplete.trainer(TRAINER, configuration)
    with incomplete.environment():
        trainer.initialize()
        loaders = trainer.get_dataloaders()
        for loader in loaders:
            for _ in range(20):
                batch = next(loader)
                unknown = batch["data"].flatten(2).isnan().any(2)
                for key, gone in zip(batch["keys"], unknown, strict=True):
                    expected = ABSENT.get(int(key.removeprefix("case_")), ())
                    assert tuple(gone.nonzero().flatten().tolist()) == tuple(expected)


def test_training_sees_subsets_and_validation_what_is_there(incomplete):
    trainer = incomplete.trainer("ModalityDropoutTrainer_4epochs_6iterations")
    seen = {True: [], False: []}
    with incomplete.environment():
        trainer.initialize()
        train, validation = trainer.get_dataloaders()
        forward = trainer.network.backbone.forward

        def watched(x, cascade, present):
            seen[trainer.network.training].append(present)
            return forward(x, cascade, present)

        trainer.network.backbone.forward = watched
        trainer.current_epoch = 3
        for _ in range(6):
            trainer.train_step(next(train))
        trainer.network.eval()
        for _ in range(6):
            trainer.validation_step(next(validation))
    had = {case: tuple(c not in ABSENT.get(case, ()) for c in range(3)) for case in range(5)}
    assert {tuple(row.tolist()) for rows in seen[False] for row in rows} <= set(had.values())
    assert {tuple(row.tolist()) for rows in seen[True] for row in rows} - set(had.values())


def test_the_cascade_keeps_them_absent(incomplete, tmp_path):
    nnunet = incomplete.with_results(tmp_path / "results")
    for fold in range(5):
        nnunet.train(TRAINER, "3d_lowres", fold)
    nnunet.train(TRAINER, "3d_cascade_fullres")
    trainer = nnunet.trainer(TRAINER, "3d_cascade_fullres")
    with nnunet.environment():
        trainer.initialize()
        loader, _ = trainer.get_dataloaders()
        for _ in range(5):
            batch = next(loader)
            unknown = batch["data"].flatten(2).isnan().any(2)
            assert unknown.shape[1] == 5
            assert not unknown[:, 3:].any()
            for key, gone in zip(batch["keys"], unknown, strict=True):
                assert tuple(gone.nonzero().flatten().tolist()) == ABSENT.get(int(key.removeprefix("case_")), ())


def test_a_training_on_incomplete_cases_continues(incomplete, tmp_path):
    nnunet = incomplete.with_results(tmp_path / "results")
    name = "ModalityDropoutTrainer_2epochs_2iterations"
    trainer = nnunet.trainer(name)
    with nnunet.environment():
        trainer.initialize()
        interrupt_second_epoch(trainer)
        with pytest.raises(KeyboardInterrupt):
            trainer.run_training()
    fold = nnunet.train(name, "3d_fullres", 0, "--c")
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 2
    assert all(torch.isfinite(w).all() for w in checkpoint["network_weights"].values())
    assert (fold / "validation" / "summary.json").is_file()


# --- prediction


@pytest.fixture(scope="module")
def trained(incomplete, datasets, tmp_path_factory):
    """Incomplete data with a model of it; complete data with a stock plan's model, and one of nnU-Net's own."""
    results = incomplete.with_results(tmp_path_factory.mktemp("results"))
    results.train(TRAINER)
    complete = datasets("labels").with_results(tmp_path_factory.mktemp("complete_results"))
    for trainer in (TRAINER, "nnUNetTrainer_1epoch_2iterations"):
        complete.train(trainer)
    return results, complete


def images_to_predict(nnunet, folder, absent):
    """Two cases larger than the patch, so that they are tiled."""
    folder.mkdir()
    for case in range(2):
        for channel in range(3):
            if channel not in absent.get(case, ()):
                source = nnunet.raw / DATASET / "imagesTr" / f"case_2_{channel:04d}.nii.gz"
                image = SimpleITK.ReadImage(str(source))
                array = np.tile(SimpleITK.GetArrayFromImage(image), (1, 1, 2))
                larger = SimpleITK.GetImageFromArray(array)
                larger.SetSpacing(image.GetSpacing())
                SimpleITK.WriteImage(larger, str(folder / f"case_{case}_{channel:04d}.nii.gz"))
    return folder


def predict(nnunet, trainer, images, output, *more):
    model = ["-d", "900", "-tr", trainer, "-p", PLANS, "-c", "3d_fullres", "-f", "0", "-device", "cpu"]
    with nnunet.environment():
        assert cli.main(["predict", "-i", str(images), "-o", str(output), *model, "--maps", *map(str, more)]) == 0
    return output


def probabilities(folder, case):
    return np.load(folder / f"case_{case}.npz")["probabilities"]


@pytest.mark.parametrize("data", ["incomplete", "complete"])
def test_stock_prediction_of_placeholders_is_ours_of_missing_files(trained, incomplete, tmp_path, data):
    """Tiled and mirrored; the model of complete data had stock plans."""
    nnunet = trained[data == "complete"]
    absent = {0: (0, 2), 1: (1,)}
    images = images_to_predict(incomplete, tmp_path / "images", absent)
    ours = predict(nnunet, TRAINER, images, tmp_path / "ours", "--samples", 1, "--save_probabilities")
    assert json.loads((ours / "case_0.json").read_text())["absent"] == ["T1", "PET"]
    cli.main(["complete", str(images), "--dataset-json", str(nnunet.raw / DATASET / "dataset.json"), "-np", "1"])
    stock = nnunet.predict(TRAINER, "3d_fullres", tmp_path / "stock", "--save_probabilities", images=images)
    completed = predict(nnunet, TRAINER, images, tmp_path / "completed", "--samples", 1, "--save_probabilities")
    assert json.loads((completed / "case_0.json").read_text())["absent"] == ["T1", "PET"]
    full = images_to_predict(incomplete, tmp_path / "full", {})
    dropped = predict(
        nnunet, TRAINER, full, tmp_path / "dropped", "--samples", 1, "--save_probabilities", "--drop", "T1,PET"
    )
    for case in range(2):
        np.testing.assert_array_equal(probabilities(completed, case), probabilities(ours, case))
        np.testing.assert_allclose(probabilities(stock, case), probabilities(ours, case), atol=1e-6)
        assert np.array_equal(*(segmentation(folder / f"case_{case}.nii.gz") for folder in (stock, ours)))
    np.testing.assert_array_equal(probabilities(dropped, 0), probabilities(ours, 0))
    assert np.abs(probabilities(dropped, 1) - probabilities(ours, 1)).max() > 1e-4


def test_every_tile_and_mirror_lacks_the_same(trained, incomplete, tmp_path):
    from nnunet_multimodal.inference.sampling import SamplePredictor

    nnunet = trained[0]
    images = images_to_predict(incomplete, tmp_path / "images", {0: (0, 2), 1: (1,)})
    with nnunet.environment():
        predictor = SamplePredictor.from_model(
            str(nnunet.model(TRAINER, "3d_fullres")), [0], torch.device("cpu"), "checkpoint_final.pth"
        )
        for case, expected in zip(
            predictor.cases(str(images), None), ([False, True, False], [True, False, True]), strict=True
        ):
            prepared = predictor.preprocess(case)
            seen = []
            hook = predictor.network.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(split_present(args[0][:, :, None])[1].tolist())
            )
            predictor.predict_distribution(prepared.data, prepared.foreground)
            hook.remove()
            assert len(seen) > 8  # tiles times mirrors
            assert all(present == [expected] for present in seen)


def test_nnunets_own_models_see_zeros(trained, incomplete, tmp_path):
    nnunet = trained[1]
    trainer, absent = "nnUNetTrainer_1epoch_2iterations", {0: (0, 2), 1: (1,)}
    images = images_to_predict(incomplete, tmp_path / "images", absent)
    output = predict(nnunet, trainer, images, tmp_path / "out", "--save_probabilities")
    zeros = images_to_predict(incomplete, tmp_path / "zeros", {})
    for case, channels in absent.items():  # z-scored, they stay zeros
        for channel in channels:
            file = zeros / f"case_{case}_{channel:04d}.nii.gz"
            SimpleITK.WriteImage(SimpleITK.ReadImage(str(file)) * 0, str(file))
    stock = nnunet.predict(trainer, "3d_fullres", tmp_path / "stock", "--save_probabilities", images=zeros)
    for case in range(2):
        np.testing.assert_allclose(probabilities(stock, case), probabilities(output, case), atol=1e-6)


def test_dropping_what_does_not_exist_or_everything_is_refused(trained, incomplete, tmp_path):
    nnunet = trained[0]
    images = images_to_predict(incomplete, tmp_path / "images", {0: (0, 2), 1: (1,)})
    with pytest.raises(UserError, match=r"--drop CT: is 0 of the model's modalities T1, T2, PET"):
        predict(nnunet, TRAINER, images, tmp_path / "out", "--drop", "CT")
    with pytest.raises(UserError, match=r"case_0 has T2, and --drop T2 leaves nothing; drop less"):
        predict(nnunet, TRAINER, images, tmp_path / "out", "--drop", "T2")
    for channel in (1, 2):
        (images / f"case_1_{channel:04d}.nii.gz").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"case_1 has T1, and --drop T1 leaves nothing; drop less"):
        predict(nnunet, TRAINER, images, tmp_path / "out", "--drop", "T1")
    assert not (tmp_path / "out").exists()


def test_a_dedicated_model_never_looks_at_the_rest(datasets, tmp_path):
    nnunet = datasets("labels").with_results(tmp_path / "results")
    plans = nnunet.plans()
    plans["configurations"]["3d_fullres"]["nnunet_multimodal"] = {"dedicated": [0, 2]}
    plans["plans_name"] = "dedicatedPlans"
    nnunet.write_plans(plans)
    short = "ShaSpecModalityDropoutTrainer_1epoch_2iterations"
    trainer = nnunet.trainer(short, "3d_fullres", "dedicatedPlans")
    with nnunet.environment():
        trainer.run_training()
    network = trainer.network.eval()
    network.deep_supervision = False
    x = torch.randn(1, 3, *trainer.configuration_manager.patch_size)
    other = x.clone()
    other[:, 1] += 1
    assert torch.equal(network(x), network(other))
    other[:, 2] += 1
    assert not torch.equal(network(x), network(other))
    images = images_to_predict(nnunet, tmp_path / "images", {0: (0, 2)})
    model = ["-d", "900", "-tr", short, "-p", "dedicatedPlans", "-c", "3d_fullres", "-f", "0", "-device", "cpu"]
    with nnunet.environment(), pytest.raises(UserError, match="case_0 has none of what the model looks at: T1, PET"):
        cli.main(["predict", "-i", str(images), "-o", str(tmp_path / "out"), *model])


@pytest.mark.parametrize(("dedicated", "left_out"), [([0], {1, 4}), ([0, 2], {1}), ([1], {0})])
def test_training_leaves_out_cases_with_nothing_to_look_at(incomplete, dedicated, left_out):
    plans = incomplete.plans()
    plans["configurations"]["3d_fullres"]["nnunet_multimodal"] = {"dedicated": dedicated}
    plans["plans_name"] = "someDedicatedPlans"
    incomplete.write_plans(plans)
    trainer = incomplete.trainer("EarlyFusionTrainer", "3d_fullres", "someDedicatedPlans", fold="all")
    with incomplete.environment():
        trainer.initialize()
        training, validation = trainer.do_split()
    assert sorted(training) == sorted(validation) == [f"case_{c}" for c in range(5) if c not in left_out]


def test_a_fold_of_nothing_to_look_at_is_refused(incomplete):
    plans = incomplete.plans()
    plans["configurations"]["3d_fullres"]["nnunet_multimodal"] = {"dedicated": [0]}
    plans["plans_name"] = "otherDedicatedPlans"
    incomplete.write_plans(plans)
    folds = [{"train": ["case_0", "case_2"], "val": ["case_1", "case_4"]}]
    splits = incomplete.preprocessed / DATASET / "splits_final.json"
    before = splits.read_text() if splits.exists() else None
    splits.write_text(json.dumps(folds))
    try:
        trainer = incomplete.trainer("EarlyFusionTrainer", "3d_fullres", "otherDedicatedPlans", fold=0)
        with incomplete.environment():
            trainer.initialize()
            with pytest.raises(UserError, match=r"no case of fold 0 .*image channels \[\(0,\)\]"):
                trainer.do_split()
    finally:
        splits.unlink() if before is None else splits.write_text(before)

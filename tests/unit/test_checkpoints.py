"""Checkpoints that would run code are refused before anything of them runs."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunet_multimodal.trainers.combinations import EarlyFusionTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_multimodal.checkpoints import refuse_code, refuse_plans
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.inference.base import ModelPredictor

CHECKPOINT = {
    "network_weights": {"a": torch.zeros(2)},
    "logging": {"ema_fg_dice": [np.float32(0.5), np.float64(1)], "dice_per_class_or_region": [[np.float64(0.1)]]},
    "init_args": {"device": torch.device("cpu"), "plans": {"a": [1, 2.0, None]}},
    "arrays": [np.arange(3), np.array([True]), np.eye(2, dtype=np.float16), np.array(1 + 2j)],
}
PLAIN = {"logging": {"ema_fg_dice": [np.float32(0.5)]}, "trainer_name": "O", "labels": {"object": 1}}


class Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nnunets_checkpoints_pass(tmp_path):
    torch.save({**CHECKPOINT, **PLAIN}, tmp_path / "checkpoint.pth")
    refuse_code(tmp_path / "checkpoint.pth")
    torch.save(torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1).state_dict(), tmp_path / "optimizer.pth")
    refuse_code(tmp_path / "optimizer.pth")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_a_folder_whose_name_is_not_utf8_does_no_harm(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xe4")
    os.mkdir(folder)
    torch.save({"weights": torch.ones(2)}, f"{folder}/checkpoint.pth")
    refuse_code(f"{folder}/checkpoint.pth")


def test_code_is_refused_and_not_run(tmp_path):
    torch.save({**CHECKPOINT, "extra": Harmful(tmp_path / "ran")}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"checkpoint\.pth would import \w+\.mkdir when loaded"):
        refuse_code(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def save_pickle(file, pickled):
    """A checkpoint of torch's format with this pickle in it."""
    torch.save({}, file.with_name("empty.pth"))
    with zipfile.ZipFile(file.with_name("empty.pth")) as empty, zipfile.ZipFile(file, "w") as archive:
        for name in empty.namelist():
            archive.writestr(name, pickled if name.endswith("data.pkl") else empty.read(name))


def text(string):
    return b"X" + len(string).to_bytes(4, "little") + string.encode()


def evaluating(code, get_builtin):
    """A pickle that evaluates an expression: eval is got by calling what ``get_builtin`` puts on the stack."""
    return b"\x80\x04" + get_builtin + b"(" + text("eval") + b"tR(" + text(code) + b"tR."


DOTTED = b"cnumpy.dtypes\n__builtins__.get\n"  # from protocol 4 on, an attribute's attribute


@pytest.mark.parametrize(
    ("get_builtin", "why"),
    [
        (DOTTED, r"would import numpy\.dtypes\.__builtins__\.get when loaded"),
        (b"cnumpy\ndtypes.__builtins__.get\n", r"would import numpy\.dtypes\.__builtins__\.get when loaded"),
        (b"ctorch._utils\n__builtins__.get\n", r"would import torch\._utils\.__builtins__\.get when loaded"),
        (b"c_codecs\n__spec__.loader.load_module\n", r"would import _codecs\.__spec__\.loader\.load_module"),
        (text("numpy.dtypes") + text("__builtins__.get") + b"\x93", "not a whole checkpoint as torch.save writes it"),
        (b"\x8c\x0cnumpy.dtypes\x8c\x10__builtins__.get\x93", "not a whole checkpoint as torch.save writes it"),
    ],
)
def test_attributes_of_harmless_modules_are_refused_and_not_run(tmp_path, get_builtin, why):
    code = f"__import__('os').mkdir({str(tmp_path / 'ran')!r})"
    save_pickle(tmp_path / "checkpoint.pth", evaluating(code, get_builtin))
    with pytest.raises(UserError, match=why):
        refuse_code(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "ran").exists()
    if get_builtin == DOTTED:  # what it would have done
        torch.load(tmp_path / "checkpoint.pth", weights_only=False)
        assert (tmp_path / "ran").exists()


class Called:
    """What a pickle calls, and with what."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


def with_state(dtype, state):
    """A type of an array that takes another's state."""

    class Changed:
        def __reduce__(self):
            return np.dtype, (dtype, False, True), state

    return Changed()


OBJECTS = (3, "|", None, None, None, -1, -1, 63)
ADDRESS = b"12345678"  # of an object, as Python would believe


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (Called(np.ndarray, (1,), "O", ADDRESS), "call of numpy.ndarray"),
        (b"\x80\x02cnumpy\nndarray\n(K\x01\x85" + text("O") + b"t\x81.", "call of numpy.ndarray"),  # its __new__
        (Called(np.ndarray, (1,), "f8", ADDRESS), "call of numpy.ndarray"),
        (np.array([1, None], dtype=object), "type O8, False, True"),
        (np.zeros(1, [("a", "f8"), ("b", "O")]), "type V16, False, True|type O8"),
        (Called(np.dtype, "i4,O"), "type i4,O"),
        (Called(np.dtype, [("a", "O")]), r"type \[\('a', 'O'\)\]"),
        (b"\x80\x02cnumpy\ndtype\n" + text("O8") + b"\x85\x81.", "type O8"),
        (with_state("f8", OBJECTS), r"type with state \(3, '\|', None, None, None, -1, -1, 63\)"),
        (with_state("f8", (3, "|", None, ("a",), {"a": (np.dtype("f8"), 0)}, 8, 1, 0)), "type with state"),
    ],
)
def test_arrays_that_are_not_of_numbers_are_refused(tmp_path, array, why):
    pickled = array if isinstance(array, bytes) else pickle.dumps({**PLAIN, "extra": array}, protocol=2)
    save_pickle(tmp_path / "checkpoint.pth", pickled)
    with pytest.raises(UserError, match=rf"checkpoint\.pth has an array that is not of numbers \(({why})"):
        refuse_code(tmp_path / "checkpoint.pth")


def test_a_call_lays_bytes_out_as_objects(tmp_path):
    """What it would have done; to look at the array would crash this process."""
    save_pickle(tmp_path / "a.pth", pickle.dumps(Called(np.ndarray, (1,), "O", ADDRESS), protocol=2))
    look = "import sys, torch; a = torch.load(sys.argv[1], weights_only=False); print(a.dtype, flush=True); repr(a[0])"
    run = subprocess.run([sys.executable, "-c", look, tmp_path / "a.pth"], capture_output=True, check=False)
    assert run.stdout == b"object\n"
    assert run.returncode < 0  # by a signal


@pytest.mark.parametrize("pickled", [b"", b"\x80\x02", b"\x80\x02X\x05", b"\x80\x02cnumpy\xff\n"])
def test_a_torn_pickle_in_a_whole_file_is_refused(tmp_path, pickled):
    save_pickle(tmp_path / "checkpoint.pth", pickled)
    with pytest.raises(UserError, match=r"checkpoint\.pth is not a whole checkpoint"):
        refuse_code(tmp_path / "checkpoint.pth")


def test_the_format_before_zip_is_refused(tmp_path):
    torch.save(Harmful(tmp_path / "ran"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"old\.pth is not a whole checkpoint"):
        refuse_code(tmp_path / "old.pth")
    assert not (tmp_path / "ran").exists()


UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
ARCHITECTURE = {
    "network_class_name": UNET,
    "arch_kwargs": {
        "n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.modules.conv.Conv2d", "kernel_sizes": [3, 3],
        "strides": [1, 2], "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}  # fmt: skip


def plans_of(architecture):
    return {"configurations": {"2d": {"architecture": architecture}, "other": {"inherits_from": "2d"}}}


def architecture_with(**changed):
    architecture = deepcopy(ARCHITECTURE)
    for key, value in changed.items():
        (architecture if key in architecture else architecture["arch_kwargs"])[key] = value
    return architecture


def shell(folder):
    """An activation that makes a folder when it is built."""
    return architecture_with(nonlin="subprocess.getoutput", nonlin_kwargs={"cmd": f"mkdir {folder}"})


@pytest.mark.parametrize(
    "network", [UNET, "dynamic_network_architectures.architectures.moved.PlainConvUNet",
                "nnunet_multimodal.network.MultimodalUNet"],
)  # fmt: skip
def test_nnunets_and_our_plans_pass(network):
    refuse_plans("plans.json", plans_of(architecture_with(network_class_name=network)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nonlin", "subprocess.getoutput"),
        ("nonlin", "eval"),
        ("nonlin", "torch.hub.load"),
        ("nonlin", "torch.nn.modules.module.torch.hub.load"),
        ("nonlin", "torch.nn.modules.module.torch.jit.ScriptModule"),
        ("nonlin", "..subprocess.getoutput"),
        ("nonlin", "torch.nn.NoSuchLayer"),
        ("conv_op", ["torch.nn.Conv2d"]),
        ("network_class_name", "subprocess.Popen"),
        ("network_class_name", "nnunetv2.run.run_training.run_training"),
        ("network_class_name", "dynamic_network_architectures.architectures.unet.np.load"),
        ("network_class_name", "dynamic_network_architectures.architectures.moved.np"),
        ("network_class_name", None),
    ],
)
def test_plans_that_name_something_else_are_refused(key, value):
    where = "network_class_name of 2d" if key == "network_class_name" else f"2d: {key}"
    with pytest.raises(UserError, match=rf"plans\.json: {where} is .* no class of layers .*use nnUNetv2_predict"):
        refuse_plans("plans.json", plans_of(architecture_with(**{key: value})))


def test_a_models_plans_are_refused_before_anything_of_them_runs(tmp_path):
    architecture = shell(tmp_path / "ran")
    (tmp_path / "fold_0").mkdir()
    torch.save(CHECKPOINT, tmp_path / "fold_0" / "checkpoint_final.pth")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0}, "file_ending": ".png"}))
    plans = plans_of(architecture) | {"image_reader_writer": "NaturalImage2DIO"}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(UserError, match=r"plans\.json: 2d: nonlin is 'subprocess\.getoutput', which is no class of"):
        ModelPredictor.from_model(str(tmp_path), ["0"], torch.device("cpu"), "checkpoint_final.pth")
    assert not (tmp_path / "ran").exists()
    kwargs = architecture["arch_kwargs"]
    with pytest.raises(TypeError):  # what it would have done
        get_network_from_plans(UNET, kwargs, architecture["_kw_requires_import"], 1, 2, deep_supervision=False)
    assert (tmp_path / "ran").exists()


def test_our_trainers_build_of_classes_of_layers_alone(tmp_path):
    plans = SimpleNamespace(dataset_name="Dataset001_A")
    of_plans = {"normalization_schemes": ["ZScoreNormalization"] * 2}
    harmful = ConfigurationManager({**of_plans, "architecture": shell(tmp_path / "ran")})
    with pytest.raises(UserError, match=r"Dataset001_A: nonlin is 'subprocess\.getoutput', which is no class"):
        EarlyFusionTrainer.build_network_architecture(plans, harmful, 2, 2)
    assert not (tmp_path / "ran").exists()
    own = ConfigurationManager({**of_plans, "architecture": architecture_with(nonlin=f"{__name__}.Doubled")})
    network = EarlyFusionTrainer.build_network_architecture(plans, own, 2, 2)
    assert any(isinstance(module, Doubled) for module in network.modules())


class Doubled(torch.nn.LeakyReLU):
    """A layer of another package."""


@pytest.mark.parametrize("keep", [0, 100, 700])
def test_a_torn_checkpoint_is_named(tmp_path, keep):
    torch.save(CHECKPOINT, tmp_path / "whole.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"torn\.pth is not a whole checkpoint"):
        refuse_code(tmp_path / "torn.pth")


def test_a_zip_cannot_write_outside_the_results_folder(tmp_path, monkeypatch):
    from nnunetv2.model_sharing import model_import

    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(model_import, "nnUNet_results", str(results))
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("../outside.txt", "")
        archive.writestr(str(tmp_path / "absolute.txt"), "")
        archive.writestr("Dataset001_A/plans.json", "{}")
    model_import.install_model_from_zip_file(str(tmp_path / "model.zip"))
    assert (results / "Dataset001_A" / "plans.json").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.zip", "results"]

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_multimodal.decomposition import decompose
from nnunet_multimodal.errors import UserError

BRATS = {
    "channel_names": {"0": "FLAIR", "1": "T1", "2": "T1CE", "3": "T2"},
    "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
    "regions_class_order": [1, 2, 3],
}
PETCT = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "lesion": 1, "organ": 2, "ignore": 3}}
SINGLE = {4: [[0], [1], [2], [3]], 2: [[0], [1]]}


def resolved(dataset, stated=None, groups=None):
    labels = LabelManager(dataset["labels"], dataset.get("regions_class_order"))
    json = dataset if stated is None else {**dataset, "nnunet_multimodal": {"decomposition": stated}}
    return decompose(json, labels, groups or SINGLE[len(dataset["channel_names"])])


def test_the_papers_decomposition_in_numbers():
    stated = {
        "FLAIR": ["whole tumor"],
        "T1": ["tumor core"],
        "T2": ["whole tumor", "tumor core"],
        "T1CE": ["tumor core", "enhancing tumor"],
    }
    assert resolved(BRATS, stated) == {
        "has_regions": True,
        "segmentors": [
            {"modalities": [0], "channels": [0]},
            {"modalities": [1], "channels": [1]},
            {"modalities": [2], "channels": [1, 2]},
            {"modalities": [3], "channels": [0, 1]},
        ],
    }


def test_the_order_of_the_keys_means_nothing():
    stated = {"PET": ["lesion"], "CT": ["organ"]}
    assert resolved(PETCT, stated) == resolved(PETCT, dict(reversed(stated.items())))


def test_labels_written_as_lists_of_one_are_labels():
    dataset = {**PETCT, "labels": {"background": 0, "lesion": [1], "organ": [2]}, "regions_class_order": None}
    labels = LabelManager(PETCT["labels"], None)
    stated = {"nnunet_multimodal": {"decomposition": {"CT": ["organ"], "PET": ["lesion"]}}}
    assert [s["channels"] for s in decompose({**dataset, **stated}, labels, SINGLE[2])["segmentors"]] == [[2], [1]]


def test_groups_that_do_not_fit_are_refused_by_themselves():
    with pytest.raises(ValueError, match="must name each of the 2 image channels"):
        resolved(PETCT, {"CT": ["organ"], "PET": ["lesion"]}, [[0], [5]])


def test_labels_keep_their_numbers_and_names_can_be_joined():
    assert resolved(PETCT) == {"has_regions": False}
    two = {"CT": ["organ"], "PET": ["lesion"]}
    assert resolved(PETCT, two)["segmentors"] == [
        {"modalities": [0], "channels": [2]},
        {"modalities": [1], "channels": [1]},
    ]
    joined = {"FLAIR+T2": ["whole tumor"], "T1 + T1CE": ["tumor core", "enhancing tumor"]}
    assert [s["modalities"] for s in resolved(BRATS, joined)["segmentors"]] == [[0, 3], [1, 2]]
    grouped = resolved(BRATS, joined, [[0, 3], [1, 2]])
    assert [s["modalities"] for s in grouped["segmentors"]] == [[0], [1]]


def test_a_name_with_a_plus_in_it_is_a_name():
    dataset = {**PETCT, "channel_names": {"0": "CT+C", "1": "PET"}}
    stated = {"CT+C": ["organ"], "PET": ["lesion"]}
    assert [s["modalities"] for s in resolved(dataset, stated)["segmentors"]] == [[0], [1]]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"CT": ["lesion"], "PT": ["organ"]}, r"'PT', of 'PT', is 0 of the channels; there are: CT, PET"),
        ({"CT": ["lesion"], "PET": ["liver"]}, r"'liver', of 'PET', is 0 .*; there are: lesion, organ"),
        ({"CT": ["lesion"], "PET": ["ignore"]}, r"'ignore'"),
        ({"CT": ["lesion"], "PET": ["background"]}, r"'background'"),
        ({"CT": ["lesion"], "PET": ["lesion"]}, "no segmentor has the label or region organ"),
        ({"CT": ["lesion", "organ"]}, "no segmentor has the channel PET"),
        ({"CT+PET": ["lesion", "organ"]}, "one segmentor"),
        ({"CT": [], "PET": ["lesion", "organ"]}, "CT predicts nothing"),
        ({"CT": ["lesion", "lesion"], "PET": ["organ"]}, "a label twice"),
        ({"CT": "lesion", "PET": ["organ"]}, "must map channel names to lists"),
        (["CT"], "must map channel names to lists"),
    ],
)
def test_a_decomposition_that_does_not_fit_names_what_does(stated, message):
    with pytest.raises(UserError, match=message):
        resolved(PETCT, stated)


def test_a_part_of_a_modality_is_no_modality():
    with pytest.raises(UserError, match="FLAIR is a part of a modality"):
        resolved(BRATS, {"FLAIR": ["whole tumor"], "T1+T1CE+T2": ["tumor core", "enhancing tumor"]}, [[0, 1], [2, 3]])

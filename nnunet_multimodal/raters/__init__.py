"""Several annotations of each image: their files, consensus, preprocessing and use in training.

A raw dataset is nnU-Net's, with the consensus in ``labelsTr`` and the raters beside it:

    labelsTr/CASE.nii.gz             what stock nnU-Net trains on (``nnunet-multimodal consensus`` makes it)
    ratersTr/CASE__RATER.nii.gz      any number for each case, also one
    ratersTr/raters.csv              optional: case, rater, weight

Preprocessed, they lie in a folder beside the data's, so that stock trainers find what they expect.
"""

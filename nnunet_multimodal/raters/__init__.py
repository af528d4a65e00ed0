"""Several annotations of each image: their files, consensus, preprocessing and use in training.

A raw dataset is nnU-Net's, with the consensus in ``labelsTr`` and the raters beside it:

    labelsTr/CASE.nii.gz             what stock nnU-Net trains on (``nnunet-multimodal consensus`` makes it)
    ratersTr/CASE__RATER.nii.gz      any number for each case, also one
    ratersTr/raters.csv              optional: case, rater, weight

Preprocessed, they lie in ``raters`` in the data's folder, where stock trainers do not look, and with which they go when
it is made anew.
"""

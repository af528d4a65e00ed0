"""Prediction beyond the segmentation: uncertainty maps."""

"""Measures of a segmentation's quality: arrays in, numbers out."""

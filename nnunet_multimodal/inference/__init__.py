"""Predicting more than label maps: samples of whole images, uncertainty, derived quantities."""

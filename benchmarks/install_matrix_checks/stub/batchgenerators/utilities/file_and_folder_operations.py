"""Stub: what nnU-Net's search takes from here."""

from os.path import join

__all__ = ["join"]

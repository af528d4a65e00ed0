"""How many voxels label maps share, for all pairs of many maps.

Counting voxels is all the work. Each label becomes one bit per voxel, so 64 voxels of a pair are compared by one AND
and one count of bits: exact, in one thread, and in little memory beyond the label maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Label = int | tuple[int, ...]
"""A label, or a region: the union of several."""

CHUNK = 2**16  # voxels at a time; 100 maps of this size are 0.8 MB of bits


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Voxel counts of label maps A and B.

    Attributes:
        intersections: (L, A, B), for each label the voxels that have it in both maps of a pair.
        sizes_a: (L, A), the voxels that have it in each map of A.
        sizes_b: (L, B), the same for B.
    """

    intersections: np.ndarray
    sizes_a: np.ndarray
    sizes_b: np.ndarray

    def iou_distance(self) -> np.ndarray:
        """1 - IoU, (L, A, B); 0 where both lack the label."""
        union = self.sizes_a[:, :, None] + self.sizes_b[:, None] - self.intersections
        return np.where(union > 0, 1 - self.intersections / np.maximum(union, 1), 0.0)

    def dice(self) -> np.ndarray:
        """Dice coefficient, (L, A, B); 1 where both lack the label."""
        total = self.sizes_a[:, :, None] + self.sizes_b[:, None]
        return np.where(total > 0, 2 * self.intersections / np.maximum(total, 1), 1.0)


def pairwise_iou_distance(
    a: np.ndarray, b: np.ndarray, labels: Sequence[Label], valid: np.ndarray | None = None
) -> np.ndarray:
    """1 - IoU, averaged over the labels, of all pairs of label maps (A, \\*D) and (B, \\*D): (A, B)."""
    return count_overlaps(a, b, labels, valid).iou_distance().mean(0)


def count_overlaps(a: np.ndarray, b: np.ndarray, labels: Sequence[Label], valid: np.ndarray | None = None) -> Overlaps:
    """Voxel counts of all pairs of label maps (A, \\*D) and (B, \\*D), of which those with valid (\\*D) count.

    Raises:
        ValueError: shapes or types do not fit.
    """
    _check([a, b], labels, valid)
    return _count([a], None if a is b else [b], labels, None if valid is None else valid[None])


def count_through_masks(
    stacks: Sequence[np.ndarray], labels: Sequence[Label], masks: np.ndarray | None = None
) -> Overlaps:
    """Voxel counts of the label maps of several stacks (N, \\*D), each seen through every mask, with one another.

    Args:
        stacks: N maps in all.
        labels: labels or regions.
        masks: bool (K, \\*D); one of all voxels if not given.

    Returns:
        of K N maps and themselves: all N through the first mask, then all N through the second, and so on.

    Raises:
        ValueError: shapes or types do not fit.
    """
    for mask in [None] if masks is None else masks:
        _check(stacks, labels, mask)
    return _count(stacks, None, labels, masks)


def _count(
    rows: Sequence[np.ndarray], columns: Sequence[np.ndarray] | None, labels: Sequence[Label], masks: np.ndarray | None
) -> Overlaps:
    """Overlaps of stacks of label maps through masks (K, \\*D), of the rows with themselves if there are no columns."""
    rows = [stack.reshape(len(stack), -1) for stack in rows]
    columns = None if columns is None else [stack.reshape(len(stack), -1) for stack in columns]
    masks = None if masks is None else masks.reshape(len(masks), -1)
    views = 1 if masks is None else len(masks)
    num_rows = views * sum(map(len, rows))
    num_columns = num_rows if columns is None else views * sum(map(len, columns))
    intersections = np.zeros((len(labels), num_rows, num_columns), dtype=np.int64)
    sizes_a, sizes_b = (np.zeros((len(labels), n), dtype=np.int64) for n in (num_rows, num_columns))
    for start in range(0, rows[0].shape[1], CHUNK):
        chunk = slice(start, start + CHUNK)
        seen = None if masks is None else _pack([masks[:, chunk]])
        for i, label in enumerate(labels):
            left = _bits(rows, chunk, label, seen)
            right = left if columns is None else _bits(columns, chunk, label, seen)
            intersections[i] += _common_bits(left, right)
            sizes_a[i] += _count_bits(left)
            sizes_b[i] += _count_bits(right)
    return Overlaps(intersections, sizes_a, sizes_b)


def _bits(stacks: Sequence[np.ndarray], chunk: slice, label: Label, seen: np.ndarray | None) -> np.ndarray:
    """One bit per voxel of a chunk, set where the map has the label: (masks x maps, words) uint64."""
    bits = _pack(_has_label(stack[:, chunk], label) for stack in stacks)
    return bits if seen is None else (bits & seen[:, None]).reshape(-1, bits.shape[1])


def _has_label(values: np.ndarray, label: Label) -> np.ndarray:
    first, *others = label if isinstance(label, tuple) else (label,)
    inside = values == first
    for other in others:
        inside |= values == other
    return inside


def _pack(masks: Iterable[np.ndarray]) -> np.ndarray:
    """Masks (N, voxels) as (all N, words) uint64, a bit per voxel."""
    bits = np.concatenate([np.packbits(mask, axis=1) for mask in masks])
    words = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8)))
    return np.ascontiguousarray(words).view(np.uint64)  # the maps may lie in memory in any order


def _common_bits(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits set in both, (A, B), of (A, words) and (B, words); half the work where both are the same array."""
    same = left is right
    used = (np.bitwise_or.reduce(left) & np.bitwise_or.reduce(right)) != 0  # most of an image has no lesion
    left, right = left.compress(used, axis=1), right.compress(used, axis=1)
    counts = np.zeros((len(left), len(right)), dtype=np.int64)
    for i, bits in enumerate(left):
        first = i if same else 0
        counts[i, first:] = _count_bits(bits & right[first:])
    return np.maximum(counts, counts.T) if same else counts


def _count_bits(words: np.ndarray) -> np.ndarray:
    """Set bits of each row."""
    return _bit_count(words).sum(1, dtype=np.int64)


def _bit_count_by_table(words: np.ndarray) -> np.ndarray:
    """numpy.bitwise_count for NumPy 1, four numbers per word."""
    return _BITS_OF_16[words.view(np.uint16)]


_BITS_OF_16 = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(
    1, dtype=np.uint8
)
_bit_count = getattr(np, "bitwise_count", _bit_count_by_table)


def _check(stacks: Sequence[np.ndarray], labels: Sequence[Label], valid: np.ndarray | None) -> None:
    shape = stacks[0].shape[1:]
    for stack in stacks:
        if stack.dtype.kind not in "iub":
            raise ValueError(f"label maps have type {stack.dtype}; round them and give integers")
        if not len(stack) or stack.shape[1:] != shape or not shape:
            shapes = ", ".join(str(s.shape) for s in stacks)
            raise ValueError(f"label maps have shapes {shapes}; give (N, *D) with N > 0 and one grid *D for all")
    if not labels or () in labels:
        raise ValueError(f"labels is {labels}; give at least one label or region, none of them empty")
    if valid is not None and (valid.shape != shape or valid.dtype != bool):
        raise ValueError(f"valid is {valid.dtype} {valid.shape}; give bool {shape}")

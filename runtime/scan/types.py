"""Names of the arrays that travel through the pipeline.

Axes are `i, j, k` in images (NIfTI's order) and `d, h, w` inside networks (the reverse, plus the plan's transpose).
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Affine: TypeAlias = NDArray[np.float64]
"""(4, 4), voxel indices to millimetres in RAS+ world space, as in NIfTI."""
Image: TypeAlias = NDArray[np.float32]
"""(i, j, k) intensities of a scan, or (d, h, w) of a network's input."""
Labels: TypeAlias = NDArray[np.unsignedinteger]
"""(i, j, k) or (d, h, w) class or label numbers."""
Features: TypeAlias = NDArray[np.floating]
"""(d, h, w, F): what the network gives before its head, or logits where the head is not deferred."""
Half: TypeAlias = NDArray[np.float16]
"""Numbers in half precision."""
Shape: TypeAlias = tuple[int, int, int]
Spacing: TypeAlias = tuple[float, float, float]
"""Millimetres between voxel centres, one per axis of the array it belongs to."""

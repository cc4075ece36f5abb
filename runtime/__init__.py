"""The runtime: from a T1 scan to labels and volumes, without PyTorch.

from edgemuse.runtime.stages import segment
result = segment("sub-01_T1w.nii.gz", "model.bundle")
"""

"""The runtime: from a T1 scan to labels and volumes, without PyTorch.

from edgemuse.runtime.pipeline.cascade import segment
result = segment("sub-01_T1w.nii.gz", "model.bundle")
"""

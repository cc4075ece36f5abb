"""What is installed with edgemuse: its own model, that model's card, and a sample scan with its truth."""

from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
BUILT_IN = DATA / "edgemuse-t1.zip"
"""Bundle of the built-in model."""
MODEL_CARD = DATA / "model-card.md"
SAMPLE_SCAN = DATA / "sample_T1w.nii.gz"
"""A sample scan that was synthesised from a deformed label map."""
SAMPLE_TRUTH = DATA / "sample_dseg.nii.gz"
"""The labels that the sample was synthesised from, in FreeSurfer's numbers."""

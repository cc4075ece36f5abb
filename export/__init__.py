"""Export, in PyTorch: an nnU-Net v2 model folder becomes a verified bundle."""

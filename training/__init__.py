"""How the built-in model was made. Needs PyTorch; not part of the installed package."""

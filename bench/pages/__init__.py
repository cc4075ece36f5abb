"""Programs that each write one page of `docs/measured`."""

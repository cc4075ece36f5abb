"""What labels mean: their table, MUSE's regions, volumes, agreement of two label maps."""

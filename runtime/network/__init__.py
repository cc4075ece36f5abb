"""From a volume to class numbers: preprocessing, tiles, sums, the head, memory."""

"""What is made of measurements: summaries, figures, the report, and comparisons."""

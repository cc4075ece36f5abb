"""What is made of measurements: summaries, figures, the report and the comparison of two."""

"""Measurements, one kind in each file: time and memory of a process, accuracy of labels, growth with size."""

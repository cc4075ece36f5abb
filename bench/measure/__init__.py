"""One measurement each: a system run in a process of its own, its accuracy, memory and scaling."""

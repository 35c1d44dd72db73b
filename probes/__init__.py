"""The parts of memory_probe.py, loop_train.py and optimizer_probe.py: bases, experiments, verdicts."""

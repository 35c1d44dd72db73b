"""The parts of memory_probe.py: bases, experiments with loops of their own, verdicts."""

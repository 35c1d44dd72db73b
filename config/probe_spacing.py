# Question: massed, uniform or expanding: does spacing matter, with exposures and the last exposure matched?
#   python memory_probe.py config/probe_spacing.py
experiment = "spacing"
seeds = 6
steps = 200

# Question: do the same exposures count for less in longer text, and when they come early in it?
#   python memory_probe.py config/probe_dilution.py
experiment = "dilution"
seeds = 6
steps = 50
arm = ["spread=256"]

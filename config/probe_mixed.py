# Question: facts in half, a quarter or an eighth of each batch: are equal exposures worth the same?
#   python memory_probe.py config/probe_mixed.py
experiment = "mixed"
exposures = 8
seeds = 6
steps = 100
share = 0.5
arm = ["share=0.25", "share=0.125"]

# Question: cohorts of facts, one after another: what do replay, EWC and sparse updates save, at what price?
#   python memory_probe.py config/probe_continual.py
experiment = "continual"
seeds = 6
facts = 16  # of each cohort, with a quarter of the answers of its own
cohorts = 4
spread = 32
steps = 100
arm = ["method=replay", "method=ewc", "method=rows"]

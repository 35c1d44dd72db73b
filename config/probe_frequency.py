# Question: what does the number of exposures (1 to 64, as in Zipf's law) buy, by optimiser?
#   python memory_probe.py config/probe_frequency.py
experiment = "frequency"
seeds = 6
steps = 100
arm = ["optimizer=muon muon_lr=0.002"]

# Question: is a fact read from the context, at some distance, worth as much as one learned in k exposures?
#   python memory_probe.py config/probe_incontext.py
from config.probe_handover import *

experiment = "incontext"
seeds = 4
exposures = 64
arm = ["window=32", "mixer=lstm pos=none", "mixer=context context_update=scan pos=none"]

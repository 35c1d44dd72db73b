# Question: is a fact read from the context, at some distance, worth as much as one learned in k exposures?
#   python memory_probe.py config/probe_incontext.py
from config.probe_handover import *

experiment = "incontext"
exposures = 32
base_steps = 1200
arm = ["window=32", "mixer=lstm pos=none", "mixer=context context_update=scan pos=none"]

# Question: how long does a fact last after one, four identical and four reworded exposures?
#   python memory_probe.py config/probe_retention.py
#   python memory_probe.py config/probe_retention.py --arm=d_model=64 --arm=d_model=256 --name=memory_sizes
experiment = "retention"

# Question: how much of what is right about sentences in a rolling window is memory, and for how long?
#   python memory_probe.py config/probe_window.py
experiment = "window"
bound = 0.05

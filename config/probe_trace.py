# Question: does training on a stretch of text make the text that follows it easier?
#   python memory_probe.py config/probe_trace.py
experiment = "trace"
bound = 0.05

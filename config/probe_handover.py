# Question: how much context does a fact need while it moves into the weights, and who wins if they disagree?
#   python memory_probe.py config/probe_handover.py
experiment = "handover"
seeds = 8
steps = 60
level = "H0"
max_seq_len = 96
d_model = 64
short_conv = 3
pool = 128
gate = 0.85
base_steps = 1200
context_share = 0.5
base_optimizer = "muon"
base_lr = 3e-3

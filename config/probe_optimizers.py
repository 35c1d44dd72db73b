# Question: does the optimiser matter for what is kept, or only whether it is the one that made the base?
#   python memory_probe.py config/probe_optimizers.py
seeds = 6
steps = 100
arm = ["optimizer=sgd lr=0.003", "optimizer=muon muon_lr=0.002", "state=fresh", "base_optimizer=muon",
       "base_optimizer=muon optimizer=sgd lr=0.003", "base_optimizer=muon optimizer=muon muon_lr=0.002"]

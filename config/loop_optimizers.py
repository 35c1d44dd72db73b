# Question: does what comes back depend on the optimiser, on its state, and on the one that made the base?
#   python loop_train.py config/loop_optimizers.py
from config.loop_causes import *

arm = ["state=fresh", "optimizer=muon muon_lr=0.005", "optimizer=sgd lr=0.03",
       "base_optimizer=muon", "base_optimizer=muon optimizer=muon muon_lr=0.005"]

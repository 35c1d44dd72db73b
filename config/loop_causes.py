# Question: when an answer comes back in a loop, why? (last write, cue, anticipation, jolt, free lunch ...)
#   python loop_train.py config/loop_causes.py
# Each arm is the control that decides one of the causes.
d_model = 64
pool = 128
base_lr = 3e-3
batch_size = 16
lr = 3e-3
segment = 16
cycles = 5
exposures = 4
seeds = 6
arm = ["order=random", "phases=0.5", "first=zero second=zero"]

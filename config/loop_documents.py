# Question: does a document's loss fall before its turn comes again? (Yang 2024, 2403.09613)
#   python loop_train.py config/loop_documents.py
# 25 documents of one row, in order, 10 steps each, with the optimiser's state carried on; no facts.
d_model = 64
pool = 128
base_lr = 3e-3
base_batch_size = 16
loops = 25
segment = 10
cycles = 5
tail = 0
rows = 1
split = "val"
questions = own = shared = 0
probes = 1
batch_size = 1
seeds = 6
optimizer = "sgd"
beta1 = 0.0
lr = 0.05
arm = ["order=random", "optimizer=adamw lr=1e-3 beta1=0.9"]

# Question: does a document's loss fall before its turn comes again? (Yang 2024, 2403.09613)
#   python loop_train.py config/loop_documents.py
# 25 documents of one row, ten steps on each, in a cycle; no facts. beta2_tokens: Adam's second moment at the
# half-life in tokens that it had while the base was trained.
d_model = 64
pool = 128
base_lr = 3e-3
base_batch_size = 16
loops = 25
segment = 10
cycles = 5
tail = 0
rows = 1
text_split = "val"
questions = own = shared = 0
probes = 1
batch_size = 1
seeds = 6
arm = ["order=random", "beta2_tokens=14000", "first=zero second=zero", "optimizer=sgd beta1=0 lr=0.05",
       "optimizer=sgd beta1=0 lr=0.05 order=random"]

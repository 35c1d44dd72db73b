# Question: what passes through soft labels alone: does a student know facts that only its teacher was taught?
#   python memory_probe.py config/probe_inherit.py
# The first arm is distilled on plain text at temperature 1; alpha=0 is the text without labels.
experiment = "inherit"
seeds = 6
d_model = 64
pool = 64
pool_share = 0.5
base_lr = 3e-3
base_batch_size = 16
batch_size = 4
exposures = 32
spread = 128
steps = 128
arm = ["alpha=0", "temperature=4", "divergence=reverse_kl", "divergence=jsd", "reads=pool", "reads=names",
       "reads=questions", "student=other", "student=other steps=512", "student=other reads=questions"]

# Question: does a small student learn more from a teacher than from the text alone, at equal tokens, and at
# equal compute with the teacher's included?
#   python sweep.py config/sweep_distill.py      # after the commands of config/distill_teacher.py
# The controls read the same text without a teacher: as many tokens, or as many FLOPs. Compare the best rates.
# (With a cache the teacher reads each row once; here no row is read twice, so that is the same.)
from config.exp10_small import *

script = "distill"
teacher = ("out/distill_teacher",)
data = "data/shakespeare_1k"
max_seq_len = 64
eval_interval = 500
prompts = ()

arm = ("lr=2.5e-3", "lr=1e-2", "without_teacher=tokens lr=2.5e-3", "without_teacher=tokens",
       "without_teacher=tokens lr=1e-2", "without_teacher=compute")
also = ("soft", "agreement")
seeds = 3

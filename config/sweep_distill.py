# Question: does a small student learn more from a teacher than from the text alone, at equal tokens, and at
# equal compute with the teacher's included?
#   python sweep.py config/sweep_distill.py      # after the commands of config/distill_teacher.py
# Base is the text alone; three learning rates each. (With a cache the teacher reads each row once; here no
# row is read twice, so equal compute is the same.)
from config.exp10_small import *

script = "distill"
teacher = ("out/distill_teacher",)
data = "data/shakespeare_1k"
max_seq_len = 64
eval_interval = 500
prompts = ()

without_teacher = "tokens"
arm = ("lr=2.5e-3", "lr=1e-2", "without_teacher=compute",
       "without_teacher=no", "without_teacher=no lr=2.5e-3", "without_teacher=no lr=1e-2",
       "without_teacher=no alpha=1")
also = ("soft", "agreement")
seeds = 3

# Question: how much of what three small teachers know together does one student of their size keep?
#   python sweep.py config/sweep_ensemble.py   # after config/sweep_distill.py: its base runs teach
# Kept: (a teacher's loss - the student's) / (a teacher's loss - that of their averaged probabilities).
from config.sweep_distill import *

script = "distill"
teacher = tuple(f"out/sweep_distill_base_s{_n}" for _n in (1, 2, 3))
without_teacher = "no"
alpha = 1.0
seed = 4
arm = ("max_steps=2000", "teacher=out/sweep_distill_base_s1",
       "teacher=out/sweep_distill_base_s1 max_steps=2000")
also = ("teacher_loss", "soft")

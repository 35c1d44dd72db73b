# Question: how many steps does a student save that starts from layers of its teacher?
#   python sweep.py config/sweep_layers.py         # after the commands of config/distill_teacher.py
# Base: the same student at random. out/*/metrics.jsonl has the loss every 50 steps.
from config.sweep_distill import *

script = "distill"
d_model = 128
d_ff = 384
eval_interval = 50
arm = ("student_layers=0,3", "student_layers=0,3 lr=3e-3", "lr=3e-3",
       "d_model=64 d_ff=192 student_layers=0,3 head_size=16 student_width=svd lr=3e-3",
       "d_model=64 d_ff=192 student_layers=0,3 head_size=16 lr=3e-3", "d_model=64 d_ff=192 head_size=16 lr=3e-3")

# Question: does a student that starts from layers of its teacher need a third of the steps?
#   python sweep.py config/sweep_layers.py         # after the commands of config/distill_teacher.py
# Base: the student at random, 1,000 steps. The others start from two of the teacher's four layers, a third of
# the steps; half as wide too, by the main directions of the stream.
from config.sweep_distill import *

script = "distill"
without_teacher = "no"
d_model = 128
d_ff = 384
arm = ("student_layers=0,3 max_steps=333",
       "d_model=64 d_ff=192 student_layers=0,3 max_steps=333 student_width=svd")

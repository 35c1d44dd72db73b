# Question: does a small student collapse that learns from probabilities alone?
# Changed from exp 9: the teacher and student of exp10_small.py, for a CPU.
# Documents: see exp 9.
#   python train.py config/demo.py && python distill.py config/exp9_small.py
from config.exp10_small import *

alpha = 1.0

# Question: does a small student collapse that learns from probabilities alone?
# The twin of exp 9 for a CPU: as config/exp10_small.py, without cross-entropy with the text.
#   python train.py config/demo.py && python distill.py config/exp9_small.py
from config.exp10_small import *

alpha = 1.0

# Question: does a new loop learn faster with the average of all loops' moments? What does it cost the others?
#   python loop_train.py config/loop_new.py
from config.loop_causes import *

first = second = "loop"
start = "last"  # carried on from the last loop
arm = ["start=zero", "start=average", "start=first", "start=second", "start=scrambled"]

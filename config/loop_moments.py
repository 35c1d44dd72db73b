# Question: does the optimiser's state, kept per loop, help its facts to survive? Which moment?
#   python loop_train.py config/loop_moments.py
from config.loop_causes import *

arm = ["first=loop", "second=loop", "first=loop second=loop", "first=zero", "first=zero second=zero"]

# Question: does it help to train only a part of the model, or each loop's own, or some weights faster?
#   python loop_train.py config/loop_parts.py
from config.loop_causes import *

arm = ["parts=ffn", "parts=attention", "parts=not-ffn", "parts=0,1,2", "lr_profile=random", "lr_profile=depth"]

# Question: does it help to train only a part of the model, or each loop's own block, or some weights faster?
#   python loop_train.py config/loop_parts.py
# lr=5.7e-3 is the control of lr_profile=random: the mean rate of its entries for all.
from config.loop_causes import *

arm = ["parts=ffn", "parts=not-ffn", "parts=0 parts=1 parts=2", "lr_profile=random", "lr=5.7e-3",
       "lr_profile=depth"]

# Question: what base for small talk can a laptop train in a few minutes?
#   python prepare_data.py chitchat && python train.py config/chat_base.py
# The recipe of config/record_1.py, a little wider and shorter, on human small talk as plain text. These
# steps see 0.6 of an epoch.
from config.record_1 import *

data = "data/chitchat"
d_model = 192
n_heads = 3
d_ff = 512

max_steps = 900
decay_fraction = 0.18
eval_interval = 500
prompts = ("hi, how are you?", "What do you like to do")

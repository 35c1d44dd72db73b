# Question: are rotary positions better than learned ones?
# Changed: RoPE instead of the position table; also evaluated at other context lengths.
# Documents (exp 7, at WikiText scale): equal perplexity in half the epochs, and no length limit.
from config.mini6 import *

pos = "rope"
eval_lens = (64, 256, 512)

# Question: does the order of the loops matter, at equal exposures? Which control order says what?
#   python loop_train.py config/loop_orders.py
# shuffled: a permutation per cycle; random: the cycle's lags at random; reversed: the other way round from
# half of the cycles on; mixed: all loops in every batch; single: one loop, then text of none.
from config.loop_causes import *

arm = ["order=shuffled", "order=random", "order=reversed", "order=mixed", "order=single"]

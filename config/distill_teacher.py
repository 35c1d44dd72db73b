# Question: which teacher do the sweeps of distillation have? A small vocabulary makes them fast on a CPU.
#   python prepare_data.py shakespeare --tokenizer=bpe:1024 --name=shakespeare_1k
#   python train.py config/distill_teacher.py
from config.demo import *

data = "data/shakespeare_1k"
max_seq_len = 64
batch_size = 32

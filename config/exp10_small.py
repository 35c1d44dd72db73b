# Question: does a teacher help a student of a quarter of its size that reads the same text?
# Changed from exp 10: a teacher trained here in minutes and a student that takes a few more; Shakespeare.
# Documents: see exp 10.
#   python train.py config/demo.py && python distill.py config/exp10_small.py
#   python distill.py config/exp10_small.py --without_teacher=tokens --name=exp10_alone   # the control
#   python sweep.py config/sweep_distill.py                                  # both, with seeds and intervals
teacher = ("out/demo",)
data = "data/shakespeare"
max_seq_len = 128

d_model = 64
n_layers = 2
n_heads = 4
pos = "rope"
activation = "swiglu"
d_ff = 192
norm = "rmsnorm"
bias = False
head_bias = False

alpha = 0.5
batch_size = 8
max_steps = 1000
lr = 5e-3
warmup_steps = 50
min_lr_ratio = 0.0
eval_interval = 200
prompts = ("ROMEO.", "To be, or not to be,", "The king")

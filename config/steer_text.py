# Question: on real text, what does a language model lose when its second learner is held at a cosine?
#   python optimizer_probe.py config/steer_text.py
task = "text"
optimizer = "adamw"
steer = "update"
seeds = 3
targets = 9
points = 3
batch_size = 16
lr = 2e-3
d_model = 64
n_layers = 2
n_heads = 2

# Question: what does a student of 1/11 the size learn from a teacher's probabilities alone?
# Changed: Qwen2.5-0.5B as teacher, a random student of 44,602,880 parameters, KL only, 5K lines, 10 epochs.
# Documents: the loss fell by 33 % while the output was ",,,,,".
#   python pretrained.py Qwen/Qwen2.5-0.5B --name=qwen
#   python prepare_data.py wikitext2 --tokenizer_from=out/qwen --name=wiki_qwen
#   python distill.py config/exp9.py
#   python distill.py config/exp9.py --cache=out/qwen_said --name=exp9_cached   # the teacher is run once
# Its twin for a CPU is config/exp9_small.py; what makes a student collapse: config/sweep_collapse.py.
teacher = ("out/qwen",)
data = "data/wiki_qwen"
examples = "lines"
min_tokens = 20
max_examples = 5000
max_seq_len = 128

d_model = 256
n_layers = 6
n_heads = 8
n_kv_heads = 2
d_ff = 1024
activation = "swiglu"
norm = "rmsnorm"
norm_eps = 1e-6
bias = False
attn_bias = "qkv"
head_bias = False
pos = "rope"
rope_theta = 1e6

alpha = 1.0
batch_size = 16
epochs = 10
lr = 5e-4
warmup_steps = 100
prompts = ("The history of India is", "In mathematics,", "The cat sat on the", "The capital of France is")

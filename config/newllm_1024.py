# Question: and four times the baseline's context? The documents give no result.
# Changed: context 1,024. 5,892,072 parameters.
from config.newllm_advanced import *

context_dim = 1024

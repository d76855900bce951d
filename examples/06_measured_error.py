"""The error of DistrAttention on data like yours, measured on a sample of rows."""

import numpy as np

import cudistr

random = np.random.RandomState(0)
q, k, v = random.standard_normal((3, 1, 4, 600, 64)).astype(np.float32)

print("normal data, causal")
print(cudistr.attention_error(q, k, v, causal=True, reduction=cudistr.LSH(group_size=2)))
print("the same, every row compared:", end=" ")
print(cudistr.attention_error(q, k, v, causal=True, reduction=cudistr.LSH(group_size=2), rows=600).output)

print("\ncolumns of q in pairs of copies with 15% noise, causal")
q = np.repeat(q[..., ::2], 2, axis=3) + np.float32(0.15) * random.standard_normal(q.shape).astype(np.float32)
print(cudistr.attention_error(q, k, v, causal=True, reduction=cudistr.LSH(group_size=2)).output)

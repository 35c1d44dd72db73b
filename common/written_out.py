"""Models as somebody would write them in a plain script, for bench.py to race against.

Shapes as in model.py
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class ContextLoop(nn.Module):
    """The gated context vector, its equations written out in a loop over positions."""

    def __init__(self, m: dict):
        super().__init__()
        C, d_ff, K = m["d_model"], m["d_ff"], m["context_dim"]
        self.embed = nn.Embedding(m["vocab_size"], C)
        self.layers = nn.ModuleList(nn.Linear(d_ff if i else C + K, d_ff) for i in range(m["n_layers"]))
        self.forget, self.input, self.update = (nn.Linear(d_ff, K) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(K), nn.Linear(d_ff, m["vocab_size"])

    def forward(self, tokens):
        """(B, T) -> logits (B, T, V)"""
        logits, c = [], self.norm.weight.new_zeros(len(tokens), len(self.norm.weight))  # (B, K)
        for t in range(tokens.size(1)):
            h = torch.cat((self.embed(tokens[:, t]), c), dim=1)  # (B, C + K)
            for layer in self.layers:
                h = F.relu(layer(h))  # (B, F)
            logits.append(self.head(h))  # (B, V)
            c = torch.sigmoid(self.forget(h)) * c + torch.sigmoid(self.input(h)) * self.update(h)  # (B, K)
            c = self.norm(c).clamp(-10, 10)
        return torch.stack(logits, dim=1)  # (B, T, V)


class PlainLSTM(nn.LSTM):
    """torch's LSTM of width d_ff between an embedding and a head."""

    def __init__(self, m: dict):
        super().__init__(m["d_model"], m["d_ff"], batch_first=True)
        self.embed = nn.Embedding(m["vocab_size"], m["d_model"])
        self.head = nn.Linear(m["d_ff"], m["vocab_size"])

    def forward(self, tokens):
        """(B, T) -> logits (B, T, V)"""
        return self.head(super().forward(self.embed(tokens))[0])

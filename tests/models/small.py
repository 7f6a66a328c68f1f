"""Small models that tests of any model share."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """A transformer's, normalization first, its attention written out."""

    def __init__(self, size=32, heads=4):
        super().__init__()
        self.before, self.between = nn.LayerNorm(size), nn.LayerNorm(size)
        self.projections, self.output = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.wide, self.narrow = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.heads = heads

    def forward(self, x):
        n, length, size = x.shape
        projected = self.projections(self.before(x)).chunk(3, -1)
        q, k, v = (part.view(n, length, self.heads, -1).transpose(1, 2) for part in projected)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(seen.transpose(1, 2).reshape(n, length, size))
        return x + self.narrow(functional.gelu(self.wide(self.between(x))))


class GPT(nn.Module):
    """A small one, with its head tied to the embedding, or not."""

    def __init__(self, words=100, size=32, layers=4, *, tied=True):
        super().__init__()
        self.words, self.places = nn.Embedding(words, size), nn.Embedding(16, size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, words, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, words):
        x = self.words(words) + self.places(torch.arange(words.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Reader(nn.Module):
    """An embedding with padding, a recurrent layer, and a head."""

    def __init__(self, recurrent):
        super().__init__()
        self.words = nn.Embedding(30, recurrent.input_size, padding_idx=0)
        self.recurrent = recurrent
        size = recurrent.proj_size or recurrent.hidden_size
        self.head = nn.Linear(size * (1 + recurrent.bidirectional), 3)

    def forward(self, words):
        return self.head(self.recurrent(self.words(words))[0][:, -1])


class Conv1D(nn.Module):
    """Hugging Face's linear layer, whose weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.nf)


def transformer(layers=3, size=32, classes=10):
    layer = nn.TransformerEncoderLayer(size, 4, 64, 0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(size), enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Linear(size, classes))

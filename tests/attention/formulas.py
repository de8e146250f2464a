"""The textbook formulas, in plain torch, that attentions must equal or approach."""

import torch


def softmax_attention(q, k, v, mask, divisor):
    """softmax(q k^T / divisor) v over real keys; rows without any give zeros."""
    weights = torch.exp(torch.einsum("bhid,bhjd->bhij", q, k) / divisor) * mask[:, None, None, :]
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bhid", weights / total.clamp(min=1e-30), v)


def shared_qk_attention(q, v, mask):
    """Reformer's exact form: keys are normalised queries, no token attends to itself."""
    q, v = q.double(), v.double()
    k = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    weights = torch.exp(torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5)
    weights = weights * mask[:, None, None, :] * (1 - torch.eye(q.shape[2]))
    return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True), v)

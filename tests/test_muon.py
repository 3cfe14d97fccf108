"""Muon on the blocks' matrices, AdamW on the rest: held against both optimizers of PyTorch, used by hand."""

import torch
from torch import nn

from model import GPT, GPTConfig
from run.machine import Machine
from run.settings import Settings, complete
from training.optimizers import make_optimizer, parameters

CONFIG = GPTConfig(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=16, bias=True)
RATES = (3e-3, 2e-3, 1e-3)


def gradients(model):
    torch.manual_seed(1)
    return [[torch.randn_like(param) for param in model.parameters()] for _ in RATES]


def new_model():
    torch.manual_seed(0)
    return GPT(CONFIG)


def test_muon_updates_the_blocks_matrices_and_adamw_the_rest():
    settings = complete(Settings(optimizer="muon", beta1=0.9, beta2=0.98, weight_decay=0.3))
    ours, theirs = new_model(), new_model()
    optimizer = make_optimizer(ours, settings, Machine(torch.device("cpu"), torch.float32, compile=False))
    assert set(parameters(optimizer)) == set(ours.parameters())

    linear = [module.weight for module in theirs.h.modules() if isinstance(module, nn.Linear)]
    others = [param for param in theirs.parameters() if all(param is not weight for weight in linear)]
    assert len(linear) == 4 * CONFIG.n_layer
    muon = torch.optim.Muon(linear, momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0)
    for lr, grads in zip(RATES, gradients(ours), strict=True):
        for group in (*optimizer.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = lr
        for model in (ours, theirs):
            for param, grad in zip(model.parameters(), grads, strict=True):
                param.grad = grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)

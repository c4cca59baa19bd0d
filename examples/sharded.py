"""A VAE whose weights do not fit on one device. Each process has a part of them (`fully_shard`, PyTorch's FSDP2).

    torchrun --nproc-per-node=2 examples/sharded.py [--steps 100]

Each process uses one CUDA device if there are any, else the CPU.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastvae.functional as F
from fastvae.data import load_digits
from fastvae.models import VAE

LATENT, BATCH = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    settings = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device(kind, rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights, batches and seeds of noise in every process
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT))
    decoder = nn.Sequential(nn.Linear(LATENT, 256), nn.ReLU(), nn.Linear(256, 784), nn.Unflatten(1, (1, 28, 28)))
    model = VAE(encoder, decoder, LATENT).to(device)
    mesh = init_device_mesh(kind, (processes,))
    for part in (model.encoder, model.decoder, model):  # of a deep model, each of its blocks
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    images = load_digits().train_images
    mine = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    for step in range(1, settings.steps + 1):
        x = images[torch.randint(len(images), (BATCH,))[mine]].to(device)
        # batch_offset: the noise is that of the whole batch, however many processes share it.
        logits, _, kl = model(x, batch_offset=mine.start)
        loss = F.elbo_loss(logits, x, kl).loss
        torch.autograd.backward(loss)  # gradients are averaged over the processes, and each keeps its part
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == settings.steps:
            shown = loss.detach()
            dist.all_reduce(shown, dist.ReduceOp.SUM)
            if rank == 0:
                print(f"step {step}: loss {shown / processes:.2f} nats per image")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
